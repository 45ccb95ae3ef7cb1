"""Repairing a repository in one answer: the code is shown, a SEARCH/REPLACE patch is asked for (the agentless stage).

Option `reward` says what decides. `execution`: the patch is applied to the repository and its tests are run,
FAIL_TO_PASS and PASS_TO_PASS, with the original tests put back. `judge`: a language model says whether it resolves the
issue (section 4.8.1; `reward.repair_judge`). `similarity`: how much its changed lines resemble the known repair's.
Released rows have their repositories in container images or clones (option `runtime`, `reward.row_scripts`); where
those cannot run, `without_image` decides.

Prompts come with the rows, or are made from a row's repository (option `prompts`): with the files that the known repair
changes, with retrieved ones, or a task of each kind.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import ClassVar

from nemo_cascade.data import repair_prompts, repair_rows, rows, splits
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward.nano_repository import OPERATORS, NanoRepository, make_repository, wrong_lines
from nemo_cascade.reward.repair_judge import Repair, grade_repair
from nemo_cascade.reward.repository_grader import RepositoryGrader, repository_task
from nemo_cascade.reward.row_containers import RUNTIMES, RowContainers
from nemo_cascade.reward.search_replace import (
    BadEdit,
    Edit,
    apply_diff,
    apply_edits,
    parse_diff,
    parse_edits,
    render_edits,
    similarity,
    unified_diff,
)
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

SHAPES = ((2,), (3,), (1, 1), (1, 2), (2, 1))


CHOICES = {
    "reward": ("execution", "judge", "similarity"),
    "without_image": ("invalid", "judge", "similarity"),
    "prompts": ("row", "golden", "retrieved", "both"),
    "runtime": ("none", "auto", *RUNTIMES),
}


class SweAgentless(SingleTurn):
    """Patches judged by the repository's tests, by a language model, or by their likeness to the known repair.

    `unreadable_reward`: for answers whose patch does not apply (Cascade 1 used -1; 0 keeps rewards in 0..1).
    `without_image`: what takes the place of execution for rows whose repository cannot run here: `invalid`, `judge` or
    `similarity`. `judge_samples`: verdicts of the judge that are averaged. `prompts`: the row's own (`row`), or made
    from its `repository_files`: `golden`, `retrieved` or `both`, with up to `shown_files` files in an order by
    `prompt_seed`. `min_prompt_tokens`: shorter prompts are dropped and counted. `runtime`: how the repositories of
    rows run; docs/swe_agentless.md has its options.
    """

    name = "swe_agentless"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {
        "unreadable_reward": 0.0,
        "reward": "execution",
        "without_image": "invalid",
        "judge_samples": 1,
        "prompts": "row",
        "shown_files": 5,
        "prompt_seed": 1,
        "min_prompt_tokens": 0,
        "runtime": "none",
        "repositories": "",  # a folder with clones: owner__name or the instance's id
        "images": "",  # a folder with SIF files, for apptainer
        "packages": "",  # bubblewrap: the folder of packages that tests see; "": the running interpreter's
        "tests_timeout_s": 1200.0,
        "start_timeout_s": 300.0,
        "memory_mb": 32768,
        "cpus": 4.0,
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        for key, known in CHOICES.items():
            if self.options[key] not in known:
                chosen = f"{self.options[key]!r}; choose {', '.join(known[:-1])} or {known[-1]}"
                raise UserError(f"data.options.swe_agentless.{key}: {chosen}")
        for key in ("judge_samples", "shown_files"):
            if int(self.options[key]) < 1:
                raise UserError(f"data.options.swe_agentless.{key}: {self.options[key]!r} is below 1")
        self.grader = RepositoryGrader(self.services.code_sandbox)
        self.containers = RowContainers(self.options, self.services)
        if self.options["runtime"] != "none":
            self.verdict_deadline_s = self.containers.deadline_s

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
        """The task of a row; the first one where `prompts: both` makes two."""
        return self.parse_rows(row, row_id)[0]

    def parse_rows(self, row: Mapping[str, Json], row_id: str) -> list[Task]:
        """The tasks of a released swerl_gen row, or of a row with its repository; `data.repair_rows` has the fields."""
        required = ["instance_id", "patch"]
        if self.options["reward"] == "execution":
            required += ["repo", "base_commit", "FAIL_TO_PASS", "PASS_TO_PASS"]
        if "judge" in (self.options["reward"], self.options["without_image"]) or self.options["prompts"] != "row":
            required.append("problem_statement")
        truth = repair_rows.instance_fields(row, row_id, required)
        truth["image"] = repair_rows.image_of(row)
        if self.options["prompts"] != "row":
            return self._made(row, row_id, truth)
        truth["shown_files"] = repair_rows.file_contents(row, "relevant_file_contents", row_id)
        messages = rows.input_messages(row, row_id)
        name = splits.content_id(str(truth["instance_id"]), splits.task_content(messages, {}))  # one of several prompts
        return [Task(name, self.name, messages, (), True, truth)]

    def _made(self, row: Mapping[str, Json], row_id: str, truth: Mapping[str, Json]) -> list[Task]:
        """One task for each wanted variant of the prompt."""
        files = repair_rows.file_contents(row, "repository_files", row_id)
        if not files:
            raise UserError(
                f"{row_id}: field 'repository_files' is missing, and prompts: {self.options['prompts']} makes prompts "
                "from it; add it, or set data.options.swe_agentless.prompts to row"
            )
        wanted = self.options["prompts"]
        issue, name = str(truth["problem_statement"]), str(truth["instance_id"])
        tasks = []
        for variant in repair_prompts.VARIANTS:
            if wanted in (variant, "both"):
                seed, k = f"{self.options['prompt_seed']}/{name}", int(self.options["shown_files"])
                try:
                    shown = repair_prompts.shown_files(files, issue, str(truth["patch"]), variant, k, seed)
                except ValueError as error:
                    raise UserError(f"{row_id}: field 'patch': {error}") from error
                messages = (Message("user", repair_prompts.repair_request(issue, shown)),)
                own: dict[str, Json] = {**truth, "shown_files": dict(shown), "variant": variant, "mode": "eval"}
                tasks.append(Task(f"{name}/{variant}", self.name, messages, (), True, own))
        return tasks

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """The reward that the options ask for, in 0..1; `unreadable_reward` when no patch can be applied."""
        refused = unanswered(transcript)
        if refused is not None:
            return refused
        content, truth = transcript.final.content, task.truth
        files = truth.get("files", truth.get("shown_files"))
        how = self.options["reward"]
        if how == "execution" and "files" not in truth:
            missing = self.containers.missing(truth)
            how = self.options["without_image"] if missing else "scripts"
            if how == "invalid":
                return Invalid(f"{truth['instance_id']}: {missing}")
        if how == "scripts" and truth["mode"] == "repro-gen":
            return self.containers.grade_reproduction(truth, content)
        unscored = _unscored(task, files)
        if unscored is not None:
            return unscored
        try:
            patched = _patched(files, content)
        except BadEdit as error:
            return Scored(float(self.options["unreadable_reward"]), {"applies": 0.0}, str(error))
        if how == "scripts":  # the row's own, in a container with its repository
            return _applied(self.containers.grade_repair(truth, files, patched))
        if how == "judge":
            samples = int(self.options["judge_samples"])
            return _applied(grade_repair(self.services.repair_judge, _repair(task, files), patched, samples))
        if how == "similarity":
            return _similar(task, _repair(task, files), patched)
        return _applied(self.grader.grade(task.id, repository_task(truth), patched))

    def cases(self) -> list[Case]:
        """A right patch in its forms, patches that miss, and the usual hacks."""
        return _cases()


def _patched(files: Mapping[str, str], content: str) -> dict[str, str]:
    """The files after the answer's SEARCH/REPLACE blocks, or after its unified diff when it has none."""
    if "<<<<<<< SEARCH" not in content and "\n@@" in content:
        return apply_diff(files, parse_diff(content))
    return apply_edits(files, parse_edits(content))


def _unscored(task: Task, files: Mapping[str, str] | None) -> Invalid | None:
    """Why a task cannot be scored without running it, with the remedy; None when it can."""
    name = str(task.truth.get("instance_id", task.id))
    if task.truth.get("mode") == "repro-gen":
        return Invalid(f"{name}: mode repro-gen asks for a script, which only running it can score; drop such rows")
    if not files:
        return Invalid(f"{name}: the row has no relevant_file_contents, and a patch must be applied to something")
    return None


def _applied(outcome: Outcome) -> Outcome:
    """The verdict on a patch that could be applied."""
    if isinstance(outcome, Invalid):
        return outcome
    return Scored(outcome.reward, {**outcome.parts, "applies": 1.0}, outcome.reason)


def _repair(task: Task, files: Mapping[str, str]) -> Repair:
    """What a patch of this task is compared with: a row's gold patch, or the line that a generated repository lacks."""
    truth = task.truth
    if "patch" not in truth:
        gold_files = apply_edits(files, [Edit(str(truth["path"]), (str(truth["before"]),), (str(truth["after"]),))])
        return Repair(task.messages[0].content.partition("\n")[0], files, unified_diff(files, gold_files), gold_files)
    gold = str(truth["patch"])
    issue = str(truth.get("problem_statement", ""))
    try:
        return Repair(issue, files, gold, apply_diff(files, parse_diff(gold)))
    except BadEdit as error:
        return Repair(issue, files, gold, None, str(error))


def _similar(task: Task, repair: Repair, patched: Mapping[str, str]) -> Outcome:
    """Execution-free reward of a row without its repository: how much the patch resembles the gold one."""
    if repair.gold_files is None:
        return Invalid(f"{task.id}: the gold patch does not fit the shown files: {repair.misfit}")
    if patched == repair.gold_files:
        return Scored(1.0, {"similarity": 1.0}, "the gold patch")
    alike = similarity(repair.files, patched, repair.gold_files)
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
