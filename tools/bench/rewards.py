"""How fast rewards are: code executions against two ways without a fork server, a large batch, math under attack.

    python -m tools.bench.rewards [--json] [--submissions 2048] [--rounds 5]

Ratios are of sums: all seconds of one side over all of the other, in rounds in which both take turns, so that a busy
machine slows both and one slow answer cannot hide in a median. `sandbox_vs_...`: executions per second at 20 tests per
submission, against a bare `python -I -S` process and against a fresh bubblewrap (the flags of our own) with such a
process, per test; the sandbox as it ships, each round with its whole life, from the first start to the last spare one.
`batch_seconds`: the time for all submissions of 20 tests, right, wrong, crashing and looping ones; all of them are
scored again by another instance in another order and must get the same outcomes. `math_with_pathological`: checks per
second with one answer of the attack battery in a hundred, over without, each answer of the battery as often as the
others; `math_slowest_seconds`: the worst of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from nemo_cascade import domains
from nemo_cascade.cascade.attacks.answers import MATH
from nemo_cascade.reward import bubblewrap
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.reward.sandbox import Sandbox
from nemo_cascade.types import Invalid, Message, Scored, Task, Transcript

TESTS = 20
SOURCE = "n = int(input())\nprint(n * n)\n"
CORES = os.cpu_count() or 1
THREADS = 2 * CORES  # a thread waits while its sandbox works
SUBMISSIONS_A_ROUND, OTHERS_A_ROUND = 64, 96  # of ours, each with TESTS tests; executions of the slower ways
MATH_CHECKS, HOSTILE_SHARE = 400, 100  # of a round; every so manieth is of the battery
BATTERY_PASSES = 2


def clock(work: Callable[[], None]) -> float:
    """Seconds of wall time."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ours() -> float:
    """Seconds of an execution: one sandbox per submission, one fork per test."""
    inputs = [str(n) for n in range(TESTS)]

    def all_of_them() -> None:
        with Sandbox() as sandbox:

            def one(_: int) -> None:
                results = sandbox.run_programs(SOURCE, inputs)
                if [result.stdout.strip() for result in results] != [str(n * n) for n in range(TESTS)]:
                    raise SystemExit(f"the sandbox gave other answers: {results[-1]}")

            _spread(one, SUBMISSIONS_A_ROUND)

    return clock(all_of_them) / (SUBMISSIONS_A_ROUND * TESTS)


def a_process_each(prefix: Sequence[str]) -> float:
    """Seconds of an execution with a new interpreter per test, behind `prefix`."""
    command = [*prefix, str(bubblewrap._python()), "-I", "-S", "-c", SOURCE]

    def one(n: int) -> None:
        done = subprocess.run(command, input=str(n), capture_output=True, text=True, check=False)
        if done.stdout.strip() != str(n * n):
            raise SystemExit(f"{command[0]} gave another answer: {done.stderr[:300]}")

    return clock(lambda: _spread(one, OTHERS_A_ROUND)) / OTHERS_A_ROUND


def _spread(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(count)))


def bubblewrap_prefix() -> list[str]:
    """Our own bubblewrap flags without the fork server."""
    arguments = bubblewrap.command(bubblewrap.launch_mode(), 64, ())
    return arguments[: arguments.index(str(bubblewrap._python()), arguments.index("--chdir"))]


def execution_seconds(rounds: int) -> dict[str, float]:
    """Seconds of an execution in each of the three ways, over all rounds."""
    found = {"sandbox": 0.0, "subprocess": 0.0, "fresh_bubblewrap": 0.0}
    prefix = bubblewrap_prefix()
    ours()  # the first start compiles the server
    for _ in range(rounds):
        found["sandbox"] += ours() / rounds
        found["subprocess"] += a_process_each(()) / rounds
        found["fresh_bubblewrap"] += a_process_each(prefix) / rounds
    return found


KINDS = (
    "print(int(input()) + {k})",
    "x = int(input())\nprint(x + {k} if x < 15 else 0)",
    "print(int(input()) - -{k})",
    "x = int(input())\nprint(x + {k} if x != 7 else 1 / 0)",
    "import os\nx = int(input())\nprint(x + {k}); os._exit(3 if x == 11 else 0)",
)
REWARDS = (1.0, 0.0, 1.0, 0.0, 0.0)


def submission(index: int) -> tuple[Task, Transcript, float]:
    """A task of its own with 20 tests, an answer, and its reward; one answer in 256 never ends."""
    k, kind = index * 7 + 1, index % len(KINDS)
    source, reward = KINDS[kind].format(k=k), REWARDS[kind]
    if index % 256 == 255:
        source, reward = f"while {k}: pass", 0.0
    truth = {"inputs": [f"{n}\n" for n in range(TESTS)], "outputs": [f"{n + k}\n" for n in range(TESTS)]}
    task = Task(f"bench-{index}", "code", (Message("user", f"Add {k}."),), (), False, truth)
    return task, Transcript((Message("assistant", source),)), reward


def score_all(indices: Sequence[int]) -> tuple[dict[int, Scored], float]:
    """(outcome of each submission, seconds); SystemExit when one is Invalid or wrong."""
    services = domains.Services()
    domain = domains.load("code", services, {"cpu_seconds": 1.0})

    def one(index: int) -> Scored:
        task, transcript, wanted = submission(index)
        outcome = domain.score(task, transcript)
        if isinstance(outcome, Invalid) or outcome.reward != wanted:
            raise SystemExit(f"submission {index} must get {wanted:g}: {outcome}")
        return outcome

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        outcomes = dict(zip(indices, pool.map(one, indices), strict=True))
    seconds = time.perf_counter() - started
    services.close()
    return outcomes, seconds


def batch(submissions: int) -> float:
    """Seconds for all; they are scored again in another order, and nothing may change: reward, parts and reason."""
    outcomes, seconds = score_all(range(submissions))
    again = random.Random(0).sample(range(submissions), submissions)
    repeated, _ = score_all(again)
    changed = [index for index in again if repeated[index] != outcomes[index]]
    if changed:
        one = changed[0]
        raise SystemExit(f"another order changed {len(changed)} outcomes: {outcomes[one]} became {repeated[one]}")
    return seconds


def math_seconds(grader: MathGrader, hostile: Sequence[str]) -> tuple[float, float]:
    """(seconds of a round of answers that need algebra, the longest of the hostile ones among them)."""
    slowest = [0.0]

    def one(n: int) -> None:
        wanted = 1.0
        gold, text = f"\\frac{{{n + 1}}}{{{n + 2}}}", f"\\boxed{{\\frac{{{2 * n + 2}}}{{{2 * n + 4}}}}}"
        which = n // HOSTILE_SHARE
        if n % HOSTILE_SHARE == HOSTILE_SHARE // 2 and which < len(hostile):
            text, wanted = hostile[which], 0.0
        started = time.perf_counter()
        outcome = grader.grade(gold, text)
        if not wanted:
            slowest.append(time.perf_counter() - started)
        if not isinstance(outcome, Scored) or outcome.reward != wanted:
            raise SystemExit(f"{text[:80]} against {gold} must get {wanted:g}: {outcome}")

    return clock(lambda: _spread(one, MATH_CHECKS)), max(slowest)


def math_totals(passes: int) -> dict[str, float]:
    """Seconds of all rounds without and with hostile answers, rounds, and the slowest of them, over whole passes."""
    battery = list(MATH.values()) * passes
    share = MATH_CHECKS // HOSTILE_SHARE
    parts = [battery[at : at + share] for at in range(0, len(battery), share)]
    found = {"plain": 0.0, "with_pathological": 0.0, "rounds": float(len(parts)), "slowest": 0.0}
    with MathGrader(workers=CORES) as grader:
        math_seconds(grader, ())  # starts the workers
        for index, hostile in enumerate(parts):
            for with_them in (index % 2 == 0, index % 2 == 1):  # neither is always the first
                seconds, slowest = math_seconds(grader, hostile if with_them else ())
                found["with_pathological" if with_them else "plain"] += seconds
                found["slowest"] = max(found["slowest"], slowest)
    return found


def measure(rounds: int, submissions: int) -> dict[str, float]:
    """All numbers; `_per_second` and `_seconds` are of this machine at this moment, the others ratios."""
    code, mathematics = execution_seconds(rounds), math_totals(BATTERY_PASSES)
    seconds = batch(submissions)
    return {
        "sandbox_vs_subprocess": code["subprocess"] / code["sandbox"],
        "sandbox_vs_fresh_bubblewrap": code["fresh_bubblewrap"] / code["sandbox"],
        "batch_seconds": seconds,
        "batch_submissions": submissions,
        "batch_scored_again": submissions,
        "math_with_pathological": mathematics["plain"] / mathematics["with_pathological"],
        "math_slowest_seconds": mathematics["slowest"],
        "executions_per_second": 1 / code["sandbox"],
        "math_checks_per_second": MATH_CHECKS * mathematics["rounds"] / mathematics["plain"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--submissions", type=int, default=2048, help="of the batch, 20 tests each (default 2048)")
    parser.add_argument("--rounds", type=int, default=5, help="of each way, alternating (default 5)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure(options.rounds, options.submissions)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for name, value in found.items():
        print(f"{name:28} {value:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
