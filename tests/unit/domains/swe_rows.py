"""A small git repository with a fault, the row that asks for its repair, and turns of an agent that works on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemo_cascade.domains.swe_agentic import SweAgentic
from nemo_cascade.reward.repository import git
from nemo_cascade.types import Json, Message, Outcome, Task, ToolCall, Transcript

FILES = {
    "shop/__init__.py": "",
    "shop/prices.py": (
        '"""Prices of a shop."""\n\nRATE = 20\n\n\n'
        'def total(prices):\n    """The sum of prices."""\n    return sum(prices)\n'
        '\n\ndef with_tax(price):\n    """A price with its tax."""\n    return price + price * RATE // 1000\n'
    ),
    "tests/conftest.py": "import pytest\n\n\n@pytest.fixture\ndef prices():\n    return [10, 20, 30]\n",
    "tests/test_prices.py": (
        "import pytest\n\nfrom shop.prices import total\n\n\n"
        "def test_total(prices):\n    assert total(prices) == 60\n\n\n"
        '@pytest.mark.parametrize("given", [[], [0, 0]], ids=["nothing at all", "zeros"])\ndef test_zero(given):\n'
        "    assert total(given) == 0\n"
    ),
    "README.md": "A shop.\n",
}
FAULT = "RATE // 1000"
REPAIR = "RATE // 100"
TEST_PATCH = """diff --git a/tests/test_prices.py b/tests/test_prices.py
--- a/tests/test_prices.py
+++ b/tests/test_prices.py
@@ -1,6 +1,14 @@
 import pytest
 
-from shop.prices import total
+from shop.prices import total, with_tax
+
+
+class TestTax:
+    def test_of_hundred(self):
+        assert with_tax(100) == 120
+
+    def test_of_nothing(self):
+        assert with_tax(0) == 0
 
 
 def test_total(prices):
"""


def repository(folder: Path) -> str:
    """The repository with a later commit that repairs it; returns the commit before that."""
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=base")
    base = git(folder, "rev-parse", "HEAD").strip()
    source = folder / "shop" / "prices.py"
    source.write_text(source.read_text().replace(FAULT, REPAIR))
    git(folder, "commit", "--quiet", "--all", "--message=the secret repair")
    return base


def row(base: str, **fields: Json) -> dict[str, Json]:
    """A row in NeMo-Gym's form: the instance in the prompt's metadata, lists as JSON texts."""
    instance: dict[str, Json] = {
        "instance_id": "acme__shop-7",
        "repo": "acme/shop",
        "base_commit": base,
        "dataset_name": "SWE-Gym/SWE-Gym",
        "problem_statement": "with_tax(100) should be 120.",
        "FAIL_TO_PASS": json.dumps(["tests/test_prices.py::TestTax::test_of_hundred"]),
        "PASS_TO_PASS": json.dumps(["tests/test_prices.py::test_total", "tests/test_prices.py::test_zero[nothing"]),
        "test_patch": TEST_PATCH,
        **fields,
    }
    return {"responses_create_params": {"input": [], "metadata": instance}}


def turn(name: str, **arguments: Json) -> Message:
    """An assistant turn with one call."""
    return Message("assistant", "", "", (ToolCall(name, arguments),))


def edit(old: str, new: str, path: str = "shop/prices.py") -> Message:
    return turn("edit", path=path, old=old, new=new)


def plant(path: str, text: str) -> Message:
    return turn("edit", path=path, old="", new=text)


DONE = turn("finish")


def play(domain: SweAgentic, task: Task, turns: Sequence[Message], cut_off: bool = False) -> tuple[Outcome, list[str]]:
    """The rollout of these turns as `collect` plays it: (verdict, the tools' answers)."""
    episode = domain.begin(task)
    said: list[Message] = []
    try:
        for message in turns:
            said.append(message)
            answers = episode.reply(message)
            if answers is None:
                break
            said += answers
    finally:
        episode.close()
    outcome = domain.score(task, Transcript(tuple(said), cut_off))
    return outcome, [message.content for message in said if message.role == "tool"]
