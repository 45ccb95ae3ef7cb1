"""Generated long-context tasks of every kind and length: solvable from their text alone, and only by reading it."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from nemo_cascade.data.haystack import KINDS
from nemo_cascade.domains.long_context import LongContext
from nemo_cascade.types import Message, Scored, Task, Transcript, UserError


def domain(task: str, words: int = 1000) -> LongContext:
    return LongContext(None, {"task": task, "words": words})


def reward(task: Task, text: str) -> float:
    outcome = LongContext().score(task, Transcript((Message("assistant", text),)))
    assert isinstance(outcome, Scored)
    return outcome.reward


def solved(kind: str, prompt: str) -> str:
    """An answer worked out from the prompt, by other means than the generator's."""
    text, _, question = prompt.rpartition("\n\n")
    if kind in ("needle", "multi_key"):
        who = re.search(r"key of (.+)\? ", question).group(1)
        (found,) = re.findall(rf"The key of {who} is (\d+)\.", text)
        return found
    if kind == "variables":
        value = re.search(r"are (\d+)\?", question).group(1)
        holds = {value}
        names = []
        for name, source in re.findall(r"Let (\w+) be (\w+)\.", text):
            if source in holds:
                holds.add(name)
                names.append(name)
        return ", ".join(reversed(names))
    return " ".join(word for word, _ in Counter(text.split()).most_common(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [1, 60, 1000, 20_000])
def test_every_kind_at_every_length(kind: str, words: int) -> None:
    long = domain(kind, words)
    for task in long.tasks("train", 3, seed=1):
        prompt = task.messages[0].content
        if words >= 1000 or kind != "variables":
            assert len(prompt.split()) < 1.2 * words + 60
        if words > 60:
            assert len(prompt.split()) > 0.8 * words
        answer = solved(kind, prompt)
        assert reward(task, answer) == 1.0
        assert reward(task, f" {answer}.\n" if task.truth["grading"] == "set" else f" {answer}\n") == 1.0
        for wrong in (*task.truth["near"], "", f"It is {answer}", prompt):
            assert reward(task, str(wrong)) == 0.0


@pytest.mark.parametrize("kind", ["variables", "common_words"])
def test_sets_are_all_and_nothing_more(kind: str) -> None:
    task = domain(kind).tasks("train", 1, seed=2)[0]
    names = str(task.truth["expected_answer"]).split(", ")
    assert reward(task, ",".join(reversed(names))) == 1.0
    assert reward(task, ", ".join(names[1:])) == 0.0
    assert reward(task, ", ".join([*names, "x1"])) == 0.0
    assert reward(task, ", ".join([*names, names[0]])) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_demonstrations_and_splits(kind: str) -> None:
    long = domain(kind, 100)
    tasks = long.tasks("train", 40, seed=3)
    assert tasks == long.tasks("train", 40, seed=3)
    assert not {task.id for task in tasks} & {task.id for task in long.tasks("report", 40, seed=3)}
    right = [long.score(task, Transcript(long.demonstrate(task, 0))) for task in tasks]
    wrong = [long.score(task, Transcript(long.demonstrate(task, 0, 1.0))) for task in tasks]
    assert {outcome.reward for outcome in right} == {1.0}
    assert {outcome.reward for outcome in wrong} == {0.0}
    assert all(bool(long.demonstrate(task, 0)[0].reasoning) == task.thinking for task in tasks)


def test_the_longest_text_is_made_in_seconds() -> None:
    for kind, make in KINDS.items():
        text = make(random.Random(kind), 200_000).text
        assert len(text.split()) > 190_000


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="task: 'sort' is not one of keys, needle"):
        domain("sort")
    with pytest.raises(UserError, match="words: 0; choose 1 to"):
        domain("needle", 0)
