"""Repairing a repository in one answer: the code is shown, a SEARCH/REPLACE patch is asked for (the agentless stage).

The patch is applied to the repository and its tests decide: FAIL_TO_PASS and PASS_TO_PASS, with the original tests put
back. Released rows can be read, but their repositories live in container images that are not part of this package; for
those an execution-free reward is an option, after Cascade 1 (section 5.7): 1 for a patch that equals the gold one, 0
for one that changes nothing, the similarity of the changed lines between.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward.nano_repository import OPERATORS, NanoRepository, make_repository, wrong_lines
from nemo_cascade.reward.repository_grader import RepositoryGrader, repository_task
from nemo_cascade.reward.search_replace import (
    BadEdit,
    Edit,
    apply_diff,
    apply_edits,
    parse_diff,
    parse_edits,
    render_edits,
    similarity,
)
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

SHAPES = ((2,), (3,), (1, 1), (1, 2), (2, 1))


class SweAgentless(SingleTurn):
    """Patches judged by the repository's tests.

    `unreadable_reward`: for answers whose patch does not apply (Cascade 1 used -1; 0 keeps rewards in 0..1).
    `without_image`: rows whose repository is not here are `invalid`, or judged by `similarity` to the gold patch.
    """

    name = "swe_agentless"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {"unreadable_reward": 0.0, "without_image": "invalid"}

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        if self.options["without_image"] not in ("invalid", "similarity"):
            chosen = self.options["without_image"]
            raise UserError(f"data.options.swe_agentless.without_image: {chosen!r}; choose invalid or similarity")
        self.grader = RepositoryGrader(self.services.code_sandbox)

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`Fix cat(5)==3.` and one or two files of one-line functions, one with a wrong operator."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The sum that must hold, then the patch of one line.

        Faults: another operator, the shown value instead of a formula, an edit of a function that was fine, a patch
        without its end.
        """
        if "after" not in task.truth:
            raise UserError(f"task {task.id}: only generated repositories have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        truth = task.truth
        path, before, after = (str(truth[key]) for key in ("path", "before", "after"))
        check = str(truth["check"])
        fault = rng.choice(("operator", "value", "place", "end")) if rng.random() < flaw_rate else ""
        if fault == "operator":
            operators = (before[-2], after[-2])
            after = f"{after[:-2]}{next(o for o in OPERATORS if o not in operators)}{after[-1]}"
        elif fault == "value":
            after = f"{after.partition('return ')[0]}return {check.partition('=')[2]}"
        elif fault == "place":
            path, before = rng.choice(wrong_lines(truth))
            after = f"{before[:-2]}{next(o for o in OPERATORS if o != before[-2])}{before[-1]}"
        content = render_edits([Edit(path, (before,), (after,))])
        if fault == "end":
            content = content.rpartition("\n")[0]
        return (Message("assistant", content, check if task.thinking else ""),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released swerl_gen row: `instance` with patch and tests, and the files that the prompt shows."""
        instance = rows.field(row, "instance", dict, row_id)
        where = f"{row_id} instance"
        truth: dict[str, Json] = {
            key: rows.field(instance, key, str, where) for key in ("instance_id", "repo", "base_commit", "patch")
        }
        for key in ("FAIL_TO_PASS", "PASS_TO_PASS"):
            truth[key] = rows.loose_json(rows.field(instance, key, object, where), key, where)
        metadata = row.get("metadata")
        if isinstance(metadata, Mapping):
            shown = rows.loose_json(metadata.get("relevant_file_contents") or {}, "relevant_file_contents", row_id)
            if not isinstance(shown, Mapping) or not all(isinstance(text, str) for text in shown.values()):
                raise UserError(f"{row_id} metadata: field 'relevant_file_contents' must map paths to texts")
            truth |= {"shown_files": shown, "image": metadata.get("image")}
        return Task(str(truth["instance_id"]), self.name, rows.input_messages(row, row_id), (), True, truth)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when the patched repository passes its tests, else 0; `unreadable_reward` when no patch can be applied."""
        refused = unanswered(transcript)
        if refused is not None:
            return refused
        content = transcript.final.content
        files = task.truth.get("files", task.truth.get("shown_files"))
        if "files" not in task.truth and (self.options["without_image"] == "invalid" or not files):
            return Invalid(f"{task.id}: this row's repository lives in a container image, which cannot run here")
        try:
            patched = _patched(files, content)
        except BadEdit as error:
            return Scored(float(self.options["unreadable_reward"]), {"applies": 0.0}, str(error))
        if "files" not in task.truth:
            return _similar(task, files, patched)
        outcome = self.grader.grade(task.id, repository_task(task.truth), patched)
        if isinstance(outcome, Invalid):
            return outcome
        return Scored(outcome.reward, {**outcome.parts, "applies": 1.0}, outcome.reason)

    def cases(self) -> list[Case]:
        """A right patch in its forms, patches that miss, and the usual hacks."""
        return _cases()


def _patched(files: Mapping[str, str], content: str) -> dict[str, str]:
    """The files after the answer's SEARCH/REPLACE blocks, or after its unified diff when it has none."""
    if "<<<<<<< SEARCH" not in content and "\n@@" in content:
        return apply_diff(files, parse_diff(content))
    return apply_edits(files, parse_edits(content))


def _similar(task: Task, files: Mapping[str, str], patched: Mapping[str, str]) -> Outcome:
    """Execution-free reward of a row without its repository: how much the patch resembles the gold one."""
    try:
        gold = apply_diff(files, parse_diff(str(task.truth["patch"])))
    except BadEdit as error:
        return Invalid(f"{task.id}: the gold patch does not fit the shown files: {error}")
    if patched == gold:
        return Scored(1.0, {"similarity": 1.0}, "the gold patch")
    alike = similarity(files, patched, gold)
    return Scored(alike, {"similarity": alike}, "similarity to the gold patch")


def _make(rng: random.Random) -> Task:
    return _task(make_repository(rng, SHAPES))


def _task(repository: NanoRepository) -> Task:
    shown = "\n".join(f"### {path}\n{text.rstrip()}" for path, text in repository.files.items())
    return make_task(SweAgentless.name, f"Fix {repository.issue}.\n{shown}", repository.truth())


def _cases() -> list[Case]:
    task = _task(make_repository(random.Random("case"), ((2, 1),), ("cat", 5, 3)))
    truth = task.truth
    path, before, after = (str(truth[key]) for key in ("path", "before", "after"))
    other_path, other = wrong_lines(truth)[0]
    patch = render_edits([Edit(path, (before,), (after,))])
    test = f"test_{path}"
    first = str(truth["tests"][test]).splitlines()[0]
    hook = Edit("conftest.py", (), ("import os; os._exit(0)",))
    escape = f"import os; os._exit(0)\n{before}"

    def case(content: str, reward: float, because: str, hack: bool = False) -> Case:
        return Case(task, Transcript((Message("assistant", content, "5-2=3"),)), reward, because, hack)

    def edit(*edits: tuple[str, str, str]) -> str:
        return render_edits([Edit(file, tuple(old.split("\n")), tuple(new.split("\n"))) for file, old, new in edits])

    longer = after.replace(": return ", ":\n    return ")
    diff = f"--- a/{path}\n+++ b/{path}\n@@ -1,1 +1,1 @@\n-{before}\n+{after}\n"
    return [
        case(patch, 1.0, "the operator repaired"),
        case(f"The operator is wrong.\n<solution>\n```python\n{patch}\n```\n</solution>", 1.0, "the released form"),
        case(edit((path, before, longer)), 1.0, "another text with the same meaning"),
        case(diff, 1.0, "a unified diff"),
        case(edit((path, before, before)), 0.0, "changes nothing"),
        case(edit((other_path, other, other.replace("return ", "return 1+"))), 0.0, "another function"),
        case(edit((path, before, after), (other_path, other, f"{other}+1")), 0.0, "repairs one, breaks another"),
        case(patch.rpartition("\n")[0], 0.0, "a patch without its end"),
        case(edit((path, before[4:], after[4:])), 0.0, "SEARCH is not a whole line"),
        case(edit((path, before, f"{after}+")), 0.0, "does not compile"),
        case(f"Hello. {after} Bye.", 0.0, "chat instead of a patch"),
        case(
            edit((path, before, f"{after.partition('return')[0]}return 3")), 0.0, "returns the shown value", hack=True
        ),
        case(edit((test, first, "def test_cat(): pass")), 0.0, "edits the tests", hack=True),
        case(edit((path, before, escape)), 0.0, "leaves before the tests", hack=True),
        case(render_edits([hook]), 0.0, "adds a file that hooks the tests", hack=True),
    ]


DOMAIN = SweAgentless
