"""How fast rewards are: code executions against two ways without a fork server, a large batch, math under attack.

    python -m tools.bench.rewards [--json] [--submissions 2048] [--rounds 5]

Ratios are medians over rounds in which both sides take turns, so that a busy machine slows both. `sandbox_vs_...`:
executions per second at 20 tests per submission, against a bare `python -I -S` process and against a fresh bubblewrap
(the flags of our own) with such a process, per test. `batch_seconds`: the time for all submissions of 20 tests, right,
wrong, crashing and looping ones; a shuffled part of them is scored again by another instance and must get the same
rewards. `math_with_pathological`: checks per second with one answer of the attack battery in a hundred, over without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
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
SUBMISSIONS_A_ROUND, OTHERS_A_ROUND = 32, 96  # of ours, each with TESTS tests; executions of the slower ways
MATH_CHECKS = 400


def rate(count: int, work: Callable[[], None]) -> float:
    """Things per second of wall time."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def ours(sandbox: Sandbox) -> float:
    """Executions per second, one sandbox per submission, one fork per test."""
    inputs = [str(n) for n in range(TESTS)]

    def one(_: int) -> None:
        results = sandbox.run_programs(SOURCE, inputs)
        if [result.stdout.strip() for result in results] != [str(n * n) for n in range(TESTS)]:
            raise SystemExit(f"the sandbox gave other answers: {results[-1]}")

    return rate(SUBMISSIONS_A_ROUND * TESTS, lambda: _spread(one, SUBMISSIONS_A_ROUND))


def a_process_each(prefix: Sequence[str]) -> float:
    """Executions per second with a new interpreter per test, behind `prefix`."""
    command = [*prefix, str(bubblewrap._python()), "-I", "-S", "-c", SOURCE]

    def one(n: int) -> None:
        done = subprocess.run(command, input=str(n), capture_output=True, text=True, check=False)
        if done.stdout.strip() != str(n * n):
            raise SystemExit(f"{command[0]} gave another answer: {done.stderr[:300]}")

    return rate(OTHERS_A_ROUND, lambda: _spread(one, OTHERS_A_ROUND))


def _spread(work: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(count)))


def bubblewrap_prefix() -> list[str]:
    """Our own bubblewrap flags without the fork server."""
    arguments = bubblewrap.command(bubblewrap.launch_mode(), 64, ())
    return arguments[: arguments.index(str(bubblewrap._python()), arguments.index("--chdir"))]


def execution_rates(rounds: int) -> dict[str, list[float]]:
    """Executions per second of the three ways, round by round."""
    found: dict[str, list[float]] = {"sandbox": [], "subprocess": [], "fresh_bubblewrap": []}
    prefix = bubblewrap_prefix()
    with Sandbox(spare=THREADS) as sandbox:
        ours(sandbox)  # the first start compiles the server
        for _ in range(rounds):
            found["sandbox"].append(ours(sandbox))
            found["subprocess"].append(a_process_each(()))
            found["fresh_bubblewrap"].append(a_process_each(prefix))
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


def score_all(indices: Sequence[int]) -> tuple[dict[int, float], float]:
    """(reward of each submission, seconds); SystemExit when one is Invalid or wrong."""
    services = domains.Services()
    domain = domains.load("code", services, {"cpu_seconds": 1.0})

    def one(index: int) -> float:
        task, transcript, wanted = submission(index)
        outcome = domain.score(task, transcript)
        if isinstance(outcome, Invalid) or outcome.reward != wanted:
            raise SystemExit(f"submission {index} must get {wanted:g}: {outcome}")
        return outcome.reward

    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        rewards = dict(zip(indices, pool.map(one, indices), strict=True))
    seconds = time.perf_counter() - started
    services.close()
    return rewards, seconds


def batch(submissions: int) -> tuple[float, int]:
    """(seconds for all, how many were scored again in another order with the same rewards)."""
    rewards, seconds = score_all(range(submissions))
    again = random.Random(0).sample(range(submissions), min(submissions, max(64, submissions // 8)))
    repeated, _ = score_all(again)
    if any(rewards[index] != reward for index, reward in repeated.items()):
        raise SystemExit("the order of submissions changed a reward")
    return seconds, len(again)


def math_rate(grader: MathGrader, pathological: bool, offset: int) -> float:
    """Checks per second of answers that need algebra; every hundredth from the attack battery where asked."""
    hostile = list(MATH.values())

    def one(n: int) -> None:
        wanted = 1.0
        gold, text = f"\\frac{{{n + 1}}}{{{n + 2}}}", f"\\boxed{{\\frac{{{2 * n + 2}}}{{{2 * n + 4}}}}}"
        if pathological and n % 100 == 50:
            text, wanted = hostile[(offset + n // 100) % len(hostile)], 0.0
        outcome = grader.grade(gold, text)
        if not isinstance(outcome, Scored) or outcome.reward != wanted:
            raise SystemExit(f"{text[:80]} against {gold} must get {wanted:g}: {outcome}")

    return rate(MATH_CHECKS, lambda: _spread(one, MATH_CHECKS))


def math_rates(rounds: int) -> dict[str, list[float]]:
    """Checks per second without and with pathological answers, round by round; rounds go through the battery."""
    found: dict[str, list[float]] = {"plain": [], "with_pathological": []}
    with MathGrader(workers=CORES) as grader:
        math_rate(grader, False, 0)  # starts the workers
        for index in range(rounds):
            found["plain"].append(math_rate(grader, False, 0))
            found["with_pathological"].append(math_rate(grader, True, index * (MATH_CHECKS // 100)))
    return found


def measure(rounds: int, submissions: int) -> dict[str, float]:
    """All numbers; those with `_per_second` are of this machine at this moment, the others are ratios."""
    code, mathematics = execution_rates(rounds), math_rates(2 * rounds)
    seconds, again = batch(submissions)
    return {
        "sandbox_vs_subprocess": _ratio(code["sandbox"], code["subprocess"]),
        "sandbox_vs_fresh_bubblewrap": _ratio(code["sandbox"], code["fresh_bubblewrap"]),
        "batch_seconds": seconds,
        "batch_submissions": submissions,
        "batch_scored_again": again,
        "math_with_pathological": _ratio(mathematics["with_pathological"], mathematics["plain"]),
        "executions_per_second": statistics.median(code["sandbox"]),
        "math_checks_per_second": statistics.median(mathematics["plain"]),
    }


def _ratio(ours_R: Sequence[float], others_R: Sequence[float]) -> float:
    return statistics.median(own / other for own, other in zip(ours_R, others_R, strict=True))


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
