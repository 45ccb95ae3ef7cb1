"""What our verdicts say of public rows whose right answers are known: HumanEval's solutions, IFEval's prompts.

    python -m tools.public_rows [--write]     NEMO_CASCADE_DATA names the folder of both files

HumanEval: every reference solution must pass, and a mutant of each (`tools/mutants.py`), which the row's tests are
known to notice when they run directly, must fail. IFEval: every prompt must load, and answers that follow none, some
and other instructions must get a verdict, strict and loose. The exit status is 1 when one does not.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nemo_cascade import domains
from nemo_cascade.data.rows import read_jsonl
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Invalid, Json, Message, Outcome, Task, Transcript
from tools.mutants import noticed_mutant

PAGE = Path(__file__).resolve().parent.parent / "docs" / "public_rows.md"
THREADS = os.cpu_count() or 1
OPTIONS: dict[str, Json] = {"cpu_seconds": 3.0}  # of a mutant that never ends: no reference takes as long
ANSWERS = ("no", "My answer is yes.\nP.S. bye", "")  # and the prompt itself


@dataclass(frozen=True)
class Checked:
    """One HumanEval row: the verdicts on its reference solution and on a mutant of it."""

    name: str
    right: Outcome
    wrong: Outcome
    kind: str
    tried: int

    @property
    def problem(self) -> str:
        """What is not as it must be; empty where nothing is."""
        if isinstance(self.right, Invalid) or self.right.reward != 1.0:
            return f"{self.name}: the reference solution got {self.right}"
        if isinstance(self.wrong, Invalid) or self.wrong.reward != 0.0:
            return f"{self.name}: a mutant ({self.kind}) got {self.wrong}"
        return ""


@dataclass
class Prompts:
    """What became of IFEval's prompts. `verdicts` and `followed` count answers; `strict_above`: prompts whose answer a
    strict reading followed and a loose one did not, which cannot be.
    """

    loaded: int = 0
    verdicts: int = 0
    answers: int = 0
    followed: dict[str, int] = field(default_factory=lambda: {"strict": 0, "loose": 0})
    strict_above: int = 0
    ids: set[str] = field(default_factory=set)


def humaneval_rows(folder: Path) -> list[dict[str, Json]]:
    """The 164 rows as they are."""
    with gzip.open(folder / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def check_humaneval(rows: Sequence[Mapping[str, Json]], domain: Domain) -> list[Checked]:
    """Reference and mutant of each row, scored by the code domain."""

    def one(row: Mapping[str, Json]) -> Checked:
        task = domain.parse_row(row, str(row["task_id"]))
        source = f"{row['prompt']}{row['canonical_solution']}"
        kind, mutant, tried = noticed_mutant(source, str(row["test"]), str(row["entry_point"]))
        return Checked(task.id, _answered(domain, task, source), _answered(domain, task, mutant), kind, tried)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, rows))


def _answered(domain: Domain, task: Task, source: str) -> Outcome:
    return domain.score(task, Transcript((Message("assistant", f"```python\n{source}\n```"),)))


def check_ifeval(rows: Sequence[Mapping[str, Json]]) -> Prompts:
    """Each prompt with the same few answers, read strictly and loosely."""
    found = Prompts()
    readings = {name: domains.load("instruction_following", None, {"checking": name}) for name in found.followed}
    for number, row in enumerate(rows):
        task = readings["strict"].parse_row(row, f"ifeval:{number}")
        found.loaded += 1
        found.ids.update(task.truth["instruction_id_list"])
        for answer in (*ANSWERS, str(row["prompt"])):
            outcomes = {
                name: domain.score(task, Transcript((Message("assistant", answer),)))
                for name, domain in readings.items()
            }
            rewards = {name: one.reward for name, one in outcomes.items() if not isinstance(one, Invalid)}
            found.answers += 1
            found.verdicts += len(rewards) == len(readings)
            for name, reward in rewards.items():
                found.followed[name] += reward > 0
            found.strict_above += rewards.get("strict", 0.0) > rewards.get("loose", 1.0)
    return found


def problems(checked: Sequence[Checked], prompts: Prompts) -> list[str]:
    """What makes the check fail."""
    found = [one.problem for one in checked if one.problem]
    if prompts.verdicts != prompts.answers:
        found.append(f"IFEval: {prompts.answers - prompts.verdicts} answers got no verdict")
    if prompts.strict_above:
        found.append(f"IFEval: {prompts.strict_above} answers are followed strictly but not loosely")
    return found


def page(checked: Sequence[Checked], prompts: Prompts) -> str:
    """The table as Markdown."""
    right = sum(not isinstance(one.right, Invalid) and one.right.reward == 1.0 for one in checked)
    wrong = sum(not isinstance(one.wrong, Invalid) and one.wrong.reward == 0.0 for one in checked)
    kinds = Counter(one.kind for one in checked)
    tried = sum(one.tried for one in checked)
    made = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"""# Verdicts on public rows

Written by `python -m tools.public_rows --write` from HumanEval (MIT, openai/human-eval) and the prompts of IFEval
(Apache-2.0).

| rows | what must hold | held |
|---|---|---|
| HumanEval | reference solutions that pass | {right} of {len(checked)} |
| HumanEval | mutants of them that fail | {wrong} of {len(checked)} |
| IFEval | prompts that load | {prompts.loaded} of {prompts.loaded} |
| IFEval | answers that get a verdict, strict and loose | {prompts.verdicts} of {prompts.answers} |

A mutant is the reference solution with one change (`tools/mutants.py`, seed 0), the first in a seeded order that the
row's tests notice when they run directly in a bare interpreter, apart from the sandbox; {tried} changes before these
were not noticed by the tests and say nothing. What was changed: {made}.

IFEval's prompts ask for {len(prompts.ids)} kinds of instructions; each prompt got {len(ANSWERS) + 1} answers (a word,
two lines, nothing, the prompt itself), of which {prompts.followed["strict"]} follow all instructions read strictly and
{prompts.followed["loose"]} loosely; none does so strictly and not loosely.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the table, write it with --write; 0 when everything holds."""
    place = os.environ.get("NEMO_CASCADE_DATA")
    if not place:
        print("NEMO_CASCADE_DATA is not set: it names the folder of HumanEval.jsonl.gz", file=sys.stderr)
        return 2
    services = domains.Services()
    try:
        checked = check_humaneval(humaneval_rows(Path(place)), domains.load("code", services, OPTIONS))
    finally:
        services.close()
    prompts = check_ifeval([row for _, row in read_jsonl(Path(place) / "ifeval_input.jsonl")])
    text = page(checked, prompts)
    print(text)
    if "--write" in arguments:
        PAGE.write_text(text, encoding="utf-8")
    wrong = problems(checked, prompts)
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
