"""The catalogue: every parser of text that a model, a judge, a server or a sandboxed program writes.

A parser may refuse a text with the exceptions that its caller turns into an answer (`refuses`), and must be done within
its limit of CPU time. What is read is the real thing: the domains' own functions, over real tasks. Programs and algebra
run in processes that can be killed; what comes back from them is here, they themselves are not.
"""

from __future__ import annotations

from tools.fuzz import answers, calls, servers, software
from tools.fuzz.answers import ARGUMENTS
from tools.fuzz.catalogue import CATALOGUE, Parser

__all__ = ["ARGUMENTS", "CATALOGUE", "NOT_PARSERS", "Parser", "answers", "calls", "servers", "software"]

NOT_PARSERS = {
    "reward.compiled": "runs compilers in the sandbox",
    "reward.fork_server": "inside the sandbox; reads the host's frames",
    "reward.git_objects": "writes",
    "reward.gym": "a package",
    "reward.math_worker": "a process that is killed when it takes too long",
    "reward.nano_repository": "generates",
    "reward.repository_runner": "inside the sandbox",
    "reward.runtimes": "what containers are; their outputs are read by reward.swe and reward.row_scripts",
    "reward.runtimes.bubblewrap": "hands bytes on",
    "reward.runtimes.process": "hands bytes on",
    "reward.swe": "a package",
    "reward.swe.pytest_runner": "inside the container",
    "reward.swe.verdict": "a rule on what the others found",
    "reward.system_calls": "writes",
    "reward.workplace_office": "generates",
    "domains.math": "its answers are read by reward.math_equal",
    "domains.mcqa": "its answers are read by reward.mcqa",
    "domains.nemo_gym": "its answers are read by reward.gym.client",
    "domains.preference": "its answers are read by reward.genrm",
}
"""Modules below `domains` and `reward` without a parser of their own, and why."""
