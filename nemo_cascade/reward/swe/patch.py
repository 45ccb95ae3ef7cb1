"""The change that an agent leaves behind, as git sees it, and which part of it may reach the tests.

A patch may not decide how it is tested: test files, what pytest and the interpreter load by themselves, and pytest's
settings stay as the base commit has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from nemo_cascade.reward.runtimes import Container, ContainerLost, Ran

MOST_BYTES = 16 << 20
GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.quotePath=true")
NEVER_CHANGED = (".venv", "r2e_tests", "run_tests.sh")
PROTECTED = (
    "conftest.py", "*/conftest.py", "sitecustomize.py", "*/sitecustomize.py", "usercustomize.py", "*/usercustomize.py",
    "sitecustomize/*", "*/sitecustomize/*", "usercustomize/*", "*/usercustomize/*",
    "*.pth", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml",
    "tests/*", "*/tests/*", "test/*", "*/test/*", "test_*.py", "*/test_*.py", "*_test.py",
    ".venv/*", "r2e_tests/*", "run_tests.sh",
)  # fmt: skip
"""Paths that stay as they are, for `git apply --exclude`; `*` stands for folders, too."""

LOADED_BY_THEMSELVES = ("conftest.py", "sitecustomize.py", "usercustomize.py")

HIDDEN = ("/r2e_tests", "/root/r2e_tests", "/run_tests.sh", "/root/run_tests.sh")
"""Where R2E-Gym's images keep the tests that grade."""

HIDE = r"""umask 022; set -e
git() { command git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c gc.auto=0 "$@"; }
rm -rf r2e_tests run_tests.sh
base=$(git rev-parse --verify HEAD); at=$(git rev-parse --git-dir)
git update-ref --no-deref HEAD "$base"
git for-each-ref --format='delete %(refname)' | git update-ref --no-deref --stdin
for name in $(git remote); do git remote remove "$name"; done
rm -rf "$at"/logs "$at"/*_HEAD "$at"/worktrees "$at"/lost-found
rm -rf "$at"/objects/info/commit-graph* "$at"/objects/pack/*.keep
echo "$base" > "$at/shallow"
git repack -a -d --quiet --window=0
rm -f "$at/objects/info/alternates"
git prune --expire=now
left=$(git cat-file --batch-all-objects --batch-check='%(objecttype) %(objectname)' | grep -E '^(commit|tag) ')
[ "$left" = "commit $base" ] || { echo "other commits than $base stay in $at" >&2; exit 1; }"""
"""Takes from an agent's repository what it should not find: R2E-Gym's tests, and all commits but its first.

The commits after it hold the repair, named or not: `git fsck --lost-found` finds what no name leads to. So the history
ends at the base commit, which keeps its name, and only its own objects are packed again: a second where packing a whole
history takes a minute for each rollout. Fails, with a word on standard error, unless it worked.
"""

HEADER = re.compile(rb"^(?:\+\+\+ b/|--- a/|rename to |rename from )([^\t\n]+)", re.MULTILINE)


def head(container: Container, seconds: float) -> str:
    """The commit that the agent starts from; ContainerLost when git does not say."""
    ran = container.run([*GIT, "rev-parse", "--verify", "HEAD"], seconds)
    commit = ran.stdout.decode("ascii", "replace").strip()
    if ran.code != 0 or not commit:
        raise ContainerLost(f"git finds no commit to start from: {_said(ran)}")
    return commit


def changes(container: Container, base: str, seconds: float) -> bytes | str:
    """The agent's patch against its base commit, new files included, ignored ones not; in words why there is none.

    ContainerLost when git does not end in time. That git fails otherwise is the agent's doing: it worked for `head`.
    """
    left_out = [f":(exclude){path}" for path in NEVER_CHANGED]
    added = container.run([*GIT, "add", "--all", "--", ".", *left_out], seconds)
    if added.code is None:
        raise ContainerLost(f"git add did not end within {seconds:g} s")
    diff = ["diff", "--cached", "--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames"]
    prefixes = ["--src-prefix=a/", "--dst-prefix=b/"]
    ran = container.run([*GIT, *diff, *prefixes, base, "--", ".", *left_out], seconds, b"", MOST_BYTES + 1)
    if added.code == 0 and ran.code == 0 and len(ran.stdout) <= MOST_BYTES:
        return ran.stdout
    if len(ran.stdout) > MOST_BYTES:
        return f"the patch has more than {MOST_BYTES} bytes"
    if ran.code is None:
        raise ContainerLost(f"git diff did not end within {seconds:g} s")
    return f"git finds no patch: {_said(added if added.code != 0 else ran)}"


def _said(ran: Ran) -> str:
    words = ran.stderr.decode("utf-8", "replace").split()
    return " ".join(words)[-150:] or ("its time ran out" if ran.code is None else f"status {ran.code}")


def sources_of(gold: bytes) -> list[str]:
    """What a known repair changes, so that the agent may change it, too; never what an interpreter loads by itself."""
    return [path for path in touched(gold) if path.rpartition("/")[2] not in LOADED_BY_THEMSELVES]


def touched(patch: bytes) -> list[str]:
    """The paths that a patch names."""
    found = (match.decode("utf-8", "replace") for match in HEADER.findall(patch))
    return sorted({path.strip('"') for path in found} - {"/dev/null"})


APPLY = [*GIT, "apply", "--whitespace=nowarn"]


def model_patch_command(tests: Iterable[str], sources: Iterable[str] = ()) -> list[str]:
    """`git apply` of the agent's patch from standard input, the first rule that fits a path decides: never these test
    files, always the `sources` (what the known repair changes), never what is protected, all the rest.
    """
    return [
        *APPLY,
        *(f"--exclude={_literal(path)}" for path in tests),
        *(f"--include={_literal(path)}" for path in sources),
        *(f"--exclude={pattern}" for pattern in PROTECTED),
        "--include=*",
    ]


def _literal(path: str) -> str:
    """A path as a pattern that matches only itself."""
    return re.sub(r"([*?\[\\])", r"\\\1", path)
