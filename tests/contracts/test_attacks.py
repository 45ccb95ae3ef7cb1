"""Every attack of the battery gains nothing, ends in time and leaves an honest submission beside it alone.

New domains are found by themselves; a new attack is a line in a table of `cascade/attacks/`.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nemo_cascade import domains
from nemo_cascade.cascade.attacks import Attack, Held, Target, assault, programs, survivors
from nemo_cascade.cascade.attacks.battery import battery
from nemo_cascade.cascade.audit import audit, to_json
from nemo_cascade.domains import Services
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Invalid, Message, Scored, Transcript

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    shared = Services(math=MathGrader(cpu_seconds=2.0, wall_seconds=300))
    yield shared
    shared.close()


def attacks_on(name: str, services: Services) -> list[Attack]:
    return battery(Target(name, lambda options: domains.load(name, services, options)))


def breaches(attacks: list[Attack]) -> list[Held]:
    assert attacks
    return [held for held in map(assault, attacks) if held.breach]


@pytest.mark.parametrize("name", domains.available())
def test_quick_attacks_are_held(name: str, services: Services) -> None:
    attacks = attacks_on(name, services)
    assert len({attack.name for attack in attacks}) == len(attacks) >= 20
    assert breaches([attack for attack in attacks if not attack.slow]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", domains.available())
def test_attacks_on_the_limits_are_held(name: str, services: Services) -> None:
    attacks = [attack for attack in attacks_on(name, services) if attack.slow]
    assert not attacks or breaches(attacks) == []


@pytest.mark.slow
def test_neighbours_of_hungry_attacks_keep_their_reward(services: Services) -> None:
    """Fork, memory, disk, output and CPU bombs: gold answers scored while they run score 1, several beside each that
    takes its time.
    """
    hungry = [attack for attack in attacks_on("code", services) if attack.hungry]
    assert len(hungry) == len(programs.HUNGRY) >= 20
    held = [assault(attack) for attack in hungry]
    assert [one for one in held if one.breach] == []
    assert sum(one.beside for one in held) >= 2 * len(hungry)
    assert all(one.beside >= 2 for one in held if one.seconds > 3.0)


def test_a_neighbour_that_loses_later_is_seen() -> None:
    """Beside a hungry attack honest submissions are scored until it has ended, not once."""
    verdicts = iter([Scored(1.0), Scored(1.0), Scored(0.0, reason="starved")])

    def eats() -> Scored:
        while not ended.wait(0.01):
            continue
        return Scored(0.0)

    def honest() -> Scored:
        verdict = next(verdicts)
        if verdict.reward == 0.0:
            ended.set()
        return verdict

    ended = threading.Event()
    found = assault(Attack("a", eats, honest, hungry=True))
    assert found.breach == "an honest submission beside it got 0 (starved)"
    assert found.beside >= 2


def test_what_an_attack_leaves_running_is_seen() -> None:
    """Also when its parent has ended: an orphan is adopted, so that its ancestor stays this process."""
    source = "import subprocess as s; print(s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL).pid)"
    pids: list[int] = []

    def leaves() -> Scored:
        pids.append(int(subprocess.run([sys.executable, "-c", source], capture_output=True, check=True).stdout))
        return Scored(0.0)

    patience, survivors.GRACE_SECONDS = survivors.GRACE_SECONDS, 0.3
    try:
        found = assault(Attack("a", leaves, lambda: Scored(1.0), sandboxed=True))
    finally:
        survivors.GRACE_SECONDS = patience
        psutil.Process(pids[0]).kill()
    assert found.breach == f"processes remain: sleep ({pids[0]})"


def test_nothing_outlives_the_attacks() -> None:
    """Fork bombs, orphans and killed servers: when the services close, every process they started is gone."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    own = Services(math=MathGrader(cpu_seconds=1.0))
    wanted = ("a process that outlives its program", "kills its parent", "a factorial of a large number")
    attacks = [a for name in ("code", "math") for a in attacks_on(name, own) if a.name.rpartition(": ")[2] in wanted]
    assert len(attacks) == 3
    assert breaches(attacks) == []
    own.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []


def test_a_breach_is_seen(services: Services) -> None:
    """The battery itself can fail: a reward that pays for nothing, raises or harms its neighbour is called a breach."""
    right = Scored(1.0)

    def raises() -> Scored:
        raise RuntimeError("a parser gave up")

    def one(score: object, honest: object = lambda: right, **more: object) -> str:
        return assault(Attack("a", score, honest, **more)).breach  # type: ignore[arg-type]

    assert one(lambda: Scored(0.0)) == ""
    assert one(lambda: Invalid("no verdict")) == ""
    assert one(lambda: Scored(0.5, reason="half")) == "earned 0.5 (half)"
    assert one(raises) == "RuntimeError escaped: a parser gave up"
    assert one(lambda: Scored(0.0), lambda: Scored(0.0)) == "an honest submission beside it got 0 ()"
    assert one(lambda: Scored(0.0), lambda: Invalid("killed")) == "an honest submission beside it got invalid (killed)"
    assert one(lambda: Scored(0.0), raises).endswith("RuntimeError escaped: a parser gave up")


def test_a_domain_of_ones_own_is_attacked(services: Services, tmp_path: Path) -> None:
    """By file and class; a reward that looks for the answer anywhere, thinking included, is found out."""
    source = (ROOT / "examples" / "reverse_words.py").read_text()
    honest = f"{ROOT / 'examples' / 'reverse_words.py'}:ReverseWords"
    naive = tmp_path / "naive.py"
    naive.write_text(
        source.replace(
            "given = transcript.final.content.split()",
            "given = (transcript.final.content + transcript.final.reasoning).split()",
        ).replace("if failed is not None:", "if False:")
    )
    rows = tmp_path / "rows.jsonl"
    prompt = {"input": [{"role": "user", "content": "Backwards: cup road"}]}
    good = {"responses_create_params": prompt, "expected_answer": "road cup"}
    rows.write_text("\n".join(json.dumps(row) for row in (good, {"responses_create_params": prompt})))
    (held,) = audit([honest], rows)
    assert held.breaches == ()
    assert (held.gold, held.anti_gold, held.rows, held.gold_rows) == ((1, 1), (2, 2), (1, 2), (1, 1))
    assert [miss.found for miss in held.misses] == [f"no task: {rows}:2: field 'expected_answer' is missing"]
    (breached,) = audit([f"{naive}:ReverseWords"], quick=True)
    assert {breach.attack for breach in breached.breaches} >= {
        "form: the answer inside the thinking",
        "form: an unfinished thought with the answer",
        "form: cut at the token limit",
    }
    answer = to_json([held])
    assert answer["breaches"] == 0
    assert answer["domains"][honest]["gold"] == {"right": 1, "total": 1}  # type: ignore[index,call-overload]


def test_the_battery_is_as_large_as_promised(services: Services) -> None:
    names = [attack.name for name in domains.available() for attack in attacks_on(name, services)]
    assert len({name for name in names if not name.startswith("hack: ")}) >= 250
    assert multiprocessing.active_children() == []


def test_a_long_answer_is_scored_as_itself(services: Services) -> None:
    """Padding costs time in proportion, not reward: the last box decides, however much stands before it."""
    domain = domains.load("math", services)
    gold = next(case for case in domain.cases() if case.reward > 0)
    text = "\\boxed{" * 100_000 + "\\boxed{42}"
    outcome = domain.score(gold.task, Transcript((Message("assistant", text),)))
    assert isinstance(outcome, Scored)
    assert (outcome.reward, outcome.reason) == (1.0, "same text")
