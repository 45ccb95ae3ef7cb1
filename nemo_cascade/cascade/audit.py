"""Does every domain's reward hold? Gold cases must score 1, anti-gold cases 0, and a battery of attacks must gain
nothing, end in time and leave honest submissions alone, before any GPU is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade import domains
from nemo_cascade.cascade.attacks import Target, assault
from nemo_cascade.cascade.attacks.battery import battery
from nemo_cascade.data import rows
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Invalid, Json, Message, Outcome, Task, Transcript, UserError

MATH_CPU_SECONDS = 2.0  # of one comparison: an attack shall not take five seconds to fail


@dataclass(frozen=True)
class Miss:
    """A case or a row that got another reward than it must, or none."""

    domain: str
    because: str
    wanted: float
    found: str


@dataclass(frozen=True)
class Breach:
    """An attack that was not held."""

    domain: str
    attack: str
    what: str


@dataclass(frozen=True)
class Audit:
    """One domain's tally: (right, all) of gold cases, anti-gold cases and rows, and the attacks with their breaches."""

    domain: str
    gold: tuple[int, int]
    anti_gold: tuple[int, int]
    attacks: int
    breaches: tuple[Breach, ...]
    misses: tuple[Miss, ...]
    rows: tuple[int, int] = (0, 0)  # rows that load, all rows
    gold_rows: tuple[int, int] = (0, 0)  # rows whose own gold answer scores 1, rows that carry one

    @property
    def failed(self) -> bool:
        """Whether anything was not as it must be."""
        return bool(self.breaches or self.misses)


def audit(
    names: Sequence[str] = (),
    rows_file: Path | None = None,
    quick: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Audit]:
    """Audit the named domains (all built-in ones by default) and the rows of a file, each by its own domain or, where
    one domain is named, by that one. `say` gets a line per domain as the audit goes on.
    """
    services = domains.Services(math=MathGrader(cpu_seconds=MATH_CPU_SECONDS))
    given = _rows_by_domain(rows_file, names) if rows_file is not None else {}
    wanted = list(names) or (list(given) if given else domains.available())
    try:
        found = []
        for name in wanted:
            found.append(_audit(name, services, given.get(name, []), quick))
            say(f"{name}: {found[-1].attacks} attacks, {len(found[-1].breaches)} breaches")
        return found
    finally:
        services.close()


def _audit(name: str, services: domains.Services, given: Sequence[tuple[str, dict[str, Json]]], quick: bool) -> Audit:
    domain = domains.load(name, services)
    tally = {"gold": [0, 0], "anti_gold": [0, 0]}
    misses = []
    for case in domain.cases():
        if case.hack:
            continue  # the battery has it
        outcome = domain.score(case.task, case.transcript)
        right = not isinstance(outcome, Invalid) and abs(outcome.reward - case.reward) < 1e-9
        counts = tally["gold" if case.reward > 0 else "anti_gold"]
        counts[0] += right
        counts[1] += 1
        if not right:
            misses.append(Miss(name, case.because, case.reward, _words(outcome)))
    target = Target(name, lambda options: domains.load(name, services, options))
    attacks = [attack for attack in battery(target) if not (quick and attack.slow)]
    held = [assault(attack) for attack in attacks]
    breaches = tuple(Breach(name, one.attack, one.breach) for one in held if one.breach)
    loads, golds, faults = _read_rows(domain, name, given)
    gold, anti_gold = ((right, total) for right, total in tally.values())
    return Audit(name, gold, anti_gold, len(attacks), breaches, (*misses, *faults), loads, golds)


def _rows_by_domain(path: Path, names: Sequence[str]) -> dict[str, list[tuple[str, dict[str, Json]]]]:
    """The rows under the name of the domain that reads them."""
    found: dict[str, list[tuple[str, dict[str, Json]]]] = {}
    for where, row in rows.read_jsonl(path):
        try:
            owner = names[0] if len(names) == 1 else domains.for_row(row)
        except UserError as error:
            raise UserError(f"{where}: {error}; or name one domain: nemo-cascade audit DOMAIN --rows {path}") from error
        found.setdefault(owner, []).append((where, row))
    if not found:
        raise UserError(f"{path}: no rows")
    unasked = sorted(set(found) - set(names)) if names else []
    if unasked:
        raise UserError(f"{path}: has rows of {', '.join(unasked)}, which are not among the domains named")
    return found


def _read_rows(
    domain: Domain, name: str, given: Sequence[tuple[str, dict[str, Json]]]
) -> tuple[tuple[int, int], tuple[int, int], list[Miss]]:
    """(rows that load, all), (gold answers that score 1, all that rows carry), what is wrong."""
    loads = golds = carried = 0
    misses = []
    for where, row in given:
        try:
            task = domain.parse_row(row, where)
        except UserError as error:
            misses.append(Miss(name, where, 1.0, f"no task: {error}"))
            continue
        loads += 1
        for answer in _gold_answers(domain, task, row):
            carried += 1
            outcome = domain.score(task, Transcript((Message("assistant", answer),)))
            right = not isinstance(outcome, Invalid) and outcome.reward == 1.0
            golds += right
            if not right:
                misses.append(Miss(name, f"{where}: its own gold answer", 1.0, _words(outcome)))
    return (loads, len(given)), (golds, carried), misses


def _gold_answers(domain: Domain, task: Task, row: Mapping[str, Json]) -> list[str]:
    """The answer that the row itself calls right, as a model would write it; none where the row has none."""
    if isinstance(row.get("canonical_solution"), str):  # HumanEval: the body of the prompt's function
        return [f"```python\n{row.get('prompt', '')}{row['canonical_solution']}\n```"]
    expected = task.truth.get("expected_answer")
    if expected is None or task.truth.get("grading") == "judge" or task.truth.get("output_regex"):
        return []
    return [f"\\boxed{{{expected}}}" if domain.name in ("math", "mcqa") else str(expected)]


def _words(outcome: Outcome) -> str:
    if isinstance(outcome, Invalid):
        return f"invalid ({outcome.reason})"
    return f"{outcome.reward:g} ({outcome.reason})"


def table(audits: Sequence[Audit]) -> str:
    """One line per domain, then one per miss and per breach."""
    with_rows = any(row.rows[1] for row in audits)
    names = ["gold", "anti-gold", "attacks", "breaches", *(["rows", "gold rows"] if with_rows else [])]
    lines = [" ".join([f"{'domain':24}", *(f"{name:>9}" for name in names)])]
    for row in audits:
        pairs = [row.gold, row.anti_gold]
        cells = [f"{right}/{total}" for right, total in pairs] + [str(row.attacks), str(len(row.breaches))]
        cells += [f"{right}/{total}" for right, total in (row.rows, row.gold_rows)] if with_rows else []
        lines.append(" ".join([f"{row.domain:24}", *(f"{cell:>9}" for cell in cells)]))
    lines += [line for row in audits for line in _problems(row)]
    held = sum(row.attacks - len(row.breaches) for row in audits)
    lines.append(f"{held} of {sum(row.attacks for row in audits)} attacks held")
    return "\n".join(lines)


def _problems(row: Audit) -> list[str]:
    misses = [f"MISS {miss.domain}: {miss.because}: wanted {miss.wanted:g}, got {miss.found}" for miss in row.misses]
    return misses + [f"BREACH {breach.domain}: {breach.attack}: {breach.what}" for breach in row.breaches]


def to_json(audits: Sequence[Audit]) -> dict[str, Json]:
    """The same for programs; `attacks` and `breaches` are numbers, what was wrong stands in `problems`."""
    found: dict[str, Json] = {}
    for row in audits:
        found[row.domain] = {
            **{name: {"right": pair[0], "total": pair[1]} for name, pair in _pairs(row)},
            "attacks": row.attacks,
            "breaches": len(row.breaches),
        }
    problems: list[Json] = [line for row in audits for line in _problems(row)]
    attacks, breaches = sum(row.attacks for row in audits), sum(len(row.breaches) for row in audits)
    return {"domains": found, "attacks": attacks, "breaches": breaches, "problems": problems}


def _pairs(row: Audit) -> list[tuple[str, tuple[int, int]]]:
    pairs = [("gold", row.gold), ("anti_gold", row.anti_gold)]
    return pairs + ([("rows", row.rows), ("gold_rows", row.gold_rows)] if row.rows[1] else [])
