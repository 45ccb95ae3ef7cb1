"""Released software rows from end to end in bubblewrap: a git repository, an agent's turns, the row's own tests."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentic import SweAgentic
from nemo_cascade.reward import repository as repository_module
from nemo_cascade.reward.swe import released
from nemo_cascade.types import Invalid, Message, Scored, Task, ToolCall, Transcript, UserError
from tests.unit.domains.swe_attacks import ATTACKS, EQUAL, HOOK
from tests.unit.domains.swe_rows import DONE, FAULT, REPAIR, TEST_PATCH, edit, plant, play, repository, row, turn

ALL_PASS = Scored(1.0, {"fail_to_pass": 1.0, "pass_to_pass": 1.0}, "all tests pass")
GOOD = edit(FAULT, REPAIR)
TEST_PATCH_OF_ANOTHER = TEST_PATCH.replace("total(prices):", "other(prices):").replace(
    "import total\n", "import other\n"
)
SMALL = {"memory_mb": 1024, "scratch_mb": 64, "processes": 64, "command_timeout_s": 60.0, "tests_timeout_s": 60.0}


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    shared = Services()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("repositories") / "acme__shop"
    folder.mkdir()
    return folder, repository(folder)


@pytest.fixture(scope="module")
def domain(services: Services, clone: tuple[Path, str]) -> SweAgentic:
    return SweAgentic(services, {"repositories": str(clone[0].parent), **SMALL})


@pytest.fixture(scope="module")
def task(domain: SweAgentic, clone: tuple[Path, str]) -> Task:
    return domain.parse_row(row(clone[1]), "rows:1")


def test_a_whole_rollout_earns_the_reward(domain: SweAgentic, task: Task) -> None:
    check = 'python -c "from shop.prices import with_tax; print(with_tax(100))"'
    turns = [
        turn("view", path="."),
        turn("search", text="def with_tax"),
        turn("view", path="shop/prices.py", start=11, end=13),
        turn("run", command=check),
        GOOD,
        turn("run", command=f"{check}; python -m pytest -q tests 2>&1 | tail -n 1; git log --oneline --all"),
        DONE,
    ]
    outcome, answers = play(domain, task, turns)
    assert outcome == ALL_PASS
    assert answers[0].split("\n") == [".git/", "README.md", "shop/", "tests/"]
    assert answers[1] == "shop/prices.py:11:def with_tax(price):"
    assert answers[2].split("\n")[0] == "11\tdef with_tax(price):"
    assert answers[2].split("\n")[-1] == "[1 more lines]"
    assert answers[3:5] == ["102", "ok"]
    checked, tests, history = answers[5].split("\n")
    assert checked == "120" and tests.startswith("3 passed")
    assert history.endswith(" base")  # the later commit, which holds the repair, is not there


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([edit(FAULT, "RATE // 50"), DONE], "tests/test_prices.py::TestTax::test_of_hundred: FAILED"),
        ([DONE], "nothing changed"),
        ([GOOD, edit("return sum(prices)", "return 60"), DONE], "tests/test_prices.py::test_zero[nothing: FAILED"),
        ([edit(FAULT, "RATE // ("), DONE], "tests/test_prices.py::TestTax::test_of_hundred: no result"),
    ],
    ids=["another number", "no edit", "breaks another test", "does not compile"],
)
def test_a_wrong_repair_earns_nothing(domain: SweAgentic, task: Task, turns: list[Message], reason: str) -> None:
    outcome, _ = play(domain, task, turns)
    assert isinstance(outcome, Scored) and (outcome.reward, outcome.reason) == (0.0, reason)


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_earn_nothing(domain: SweAgentic, task: Task, name: str) -> None:
    outcome, answers = play(domain, task, [*ATTACKS[name], DONE])
    assert not any(answer.startswith("error") for answer in answers), answers
    assert isinstance(outcome, Scored) and outcome.reward == 0.0, outcome


def test_what_may_not_count_does_not_spoil_a_repair(domain: SweAgentic, task: Task) -> None:
    """Edited tests, planted settings and a meddled git configuration beside the right repair: they are left out."""
    command = "git config diff.external false; git config core.fsmonitor false; rm tests/conftest.py; touch new.txt"
    turns = [GOOD, edit("assert total(prices) == 60", "pass", "tests/test_prices.py"), turn("run", command=command)]
    outcome, _ = play(domain, task, [*turns, plant("conftest.py", HOOK), Message("assistant", "Done.")])
    assert outcome == ALL_PASS


def test_a_rollout_that_was_cut_off(domain: SweAgentic, task: Task) -> None:
    """By the limit on turns, with a call pending; by the token limit, in a turn that nobody answered."""
    outcome, _ = play(domain, task, [GOOD], cut_off=True)
    assert outcome == Invalid("resolved, but cut off by the limit on turns or context")
    outcome, _ = play(domain, task, [edit(FAULT, "RATE // 50")], cut_off=True)
    assert isinstance(outcome, Scored) and outcome.reward == 0.0 and outcome.reason.startswith("truncated; ")
    episode = domain.begin(task)
    said = (GOOD, *(episode.reply(GOOD) or ()), Message("assistant", "", "I wonder"))
    episode.close()
    assert isinstance(domain.score(task, Transcript(said, truncated=True)), Invalid)
    assert domain.score(task, Transcript(())) == Scored(
        0.0, {"fail_to_pass": 0.0, "pass_to_pass": 1.0}, "nothing changed"
    )


def test_a_stored_rollout_is_played_again(services: Services, domain: SweAgentic, task: Task) -> None:
    """Another process has only the transcript; its verdict is the same, and so is a second one here."""
    command = "sed -i 's_RATE // 1000_RATE // 100_' shop/prices.py"
    first, answers = play(domain, task, [turn("run", command=command), DONE])
    said = (turn("run", command=command), Message("tool", answers[0]), DONE)
    other = SweAgentic(services, dict(domain.options))
    assert other.score(task, Transcript(said)) == domain.score(task, Transcript(said)) == first == ALL_PASS


def test_patches_do_not_pile_up(
    services: Services, domain: SweAgentic, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the tests have judged is dropped, and still has both verdicts; the others are bounded in bytes."""
    fresh = SweAgentic(services, dict(domain.options))
    outcome, answers = play(fresh, task, [GOOD, DONE])
    said = (GOOD, Message("tool", answers[0]), DONE)
    (ended,) = fresh.released._ended.values()
    assert outcome == ALL_PASS and ended.patch == b""
    monkeypatch.setattr(fresh.released, "start", None)  # nothing is started for the second verdict
    assert fresh.score(task, Transcript(said)) == ALL_PASS
    cut_off = fresh.score(task, Transcript(said, truncated=True))
    assert cut_off == Invalid("resolved, but cut off by the limit on turns or context")
    monkeypatch.setattr(released, "REMEMBERED_BYTES", 1000)
    for key in "abcd":
        fresh.released.remember(key, released.Ended(patch=bytes(400)))
    assert list(fresh.released._ended) == ["c", "d"]


def test_limits_of_commands_and_outputs(services: Services, domain: SweAgentic, task: Task) -> None:
    options = {**domain.options, "command_timeout_s": 4.0, "output_chars": 200}
    episode = SweAgentic(services, options).begin(task)

    def said(command: str) -> str:
        answers = episode.reply(turn("run", command=command))
        assert answers is not None
        return answers[0].content

    try:
        assert said("exit 3") == "[exit status 3]"
        assert said("echo on; sleep 30") == "on\n[ended after 4 s]"
        long = said("seq 1 100000")
        assert long.startswith("1\n2\n") and long.endswith("\n99999\n100000") and 200 < len(long) < 300
        assert said("kill -9 $PPID; sleep 1") == "[exit status 137]"
        assert "Network is unreachable" in said(
            "python -c 'import socket; socket.create_connection((\"1.1.1.1\", 80))'"
        )
        assert said("python -c 'x = bytearray(2 << 30)' 2>&1 | tail -n 1") == "MemoryError"
        assert said("id -u") not in ("0", "")
        assert said("ls /etc /home /var 2>&1 | grep -c 'No such file'") == "3"
        both = (ToolCall("run", {"command": "sleep 9"}), ToolCall("run", {"command": "echo late"}))
        answers = episode.reply(Message("assistant", tool_calls=both))
        assert answers is not None
        assert [answer.content for answer in answers] == ["[ended after 4 s]", "error: the time for this turn is over"]
    finally:
        episode.close()


def test_wrong_calls_are_answered_and_change_nothing(domain: SweAgentic, task: Task) -> None:
    calls = [
        (turn("open", path="x"), "error: no tool open; there are view, search, edit, run, finish"),
        (turn("view"), "error: view needs path, and may have no other than path, start, end"),
        (turn("view", path="shop/prices.py", start="1"), "error: start must be a whole number"),
        (turn("view", path="nowhere.py"), "error: base64: nowhere.py: No such file or directory"),
        (turn("view", path="README.md", start=9), "error: the file has 2 lines"),
        (turn("run", command="a\0b"), "error: command has characters that no file holds"),
        (turn("edit", path="a", old="\ud800", new=""), "error: old has characters that no file holds"),
        (turn("edit", path="", old="a", new="b"), "error: path is empty"),
        (
            turn("edit", path="README.md", old="", new="b"),
            "error: the file is there; `old` must name the text to replace",
        ),
        (turn("edit", path="README.md", old="z", new="b"), "error: old is not there"),
        (turn("edit", path="shop/prices.py", old="price", new="b"), "error: old is there 7 times"),
        (turn("search", text="no such text"), "nothing"),
        (turn("search", text="x", path="-r"), "error: grep: -r: No such file or directory"),
    ]
    outcome, answers = play(domain, task, [*(message for message, _ in calls), DONE])
    assert answers == [answer for _, answer in calls]
    assert isinstance(outcome, Scored) and outcome.reason == "nothing changed"


def test_the_clock_of_a_rollout(services: Services, domain: SweAgentic, task: Task) -> None:
    """Resolved or not, a rollout that ran out of time is no answer; the clock covers sampling, too."""
    late = Invalid("the rollout ran out of its wall-clock time")
    hurried = SweAgentic(services, {**domain.options, "agent_timeout_s": 8.0})
    outcome, answers = play(hurried, task, [GOOD, turn("run", command="sleep 30"), DONE])
    assert (outcome, answers) == (late, ["ok"])
    episode = domain.begin(task)
    assert episode.reply(GOOD) is not None
    episode.deadline = time.monotonic()  # as if the next turn had been sampled for an hour
    assert episode.reply(DONE) is None
    episode.close()
    assert domain.score(task, Transcript((GOOD, Message("tool", "ok"), DONE))) == late


def test_tests_that_do_not_end_or_need_too_much(services: Services, domain: SweAgentic, task: Task) -> None:
    impatient = SweAgentic(services, {**domain.options, "tests_timeout_s": 2.0})
    outcome, _ = play(impatient, task, [edit("RATE = 20", "RATE = 20\nimport time\ntime.sleep(60)"), DONE])
    assert outcome == Invalid("the tests ran out of their wall-clock time")


def test_who_ends_the_sandbox_earns_nothing(domain: SweAgentic, task: Task) -> None:
    """The agent's own one, and that of the tests: neither is a failure of ours."""
    outcome, answers = play(domain, task, [GOOD, turn("run", command="kill -9 -1"), DONE])
    assert outcome == Scored(0.0, {}, "a command ended its sandbox")
    assert answers == ["ok"]
    kill = edit("RATE = 20", "RATE = 20\nimport os\nos.kill(-1, 9)")
    outcome, _ = play(domain, task, [GOOD, kill, DONE])
    assert isinstance(outcome, Scored) and outcome.reason.endswith("TestTax::test_of_hundred: no result")


def test_r2e_rows_are_graded_by_recorded_statuses(domain: SweAgentic, clone: tuple[Path, str]) -> None:
    """Hidden tests from the row, every status as recorded: one passes, one fails for good, and none is missing."""
    code = "from shop.prices import with_tax\n\n\nclass TestTax:\n    def test_a(self):\n"
    code += "        assert with_tax(100) == 120\n\n\ndef test_b():\n    assert with_tax(100) == 121\n"
    recorded = {"TestTax.test_a": "PASSED", "\x1b[1mtest_b\x1b[0m - assert 120 == 121": "FAILED"}
    fields = {
        "repo_name": "acme/shop",
        "commit_hash": clone[1],
        "problem_statement": "with_tax(100) should be 120.",
        "dataset_name": "R2E-Gym/R2E-Gym-Subset",
        "expected_output_json": json.dumps(recorded),
        "execution_result_content": json.dumps({"test_file_names": ["test_1.py"], "test_file_codes": [code]}),
    }
    task = domain.parse_row({"responses_create_params": {"metadata": {"instance_dict": json.dumps(fields)}}}, "rows:1")
    assert task.id == f"acme/shop__{clone[1]}"
    outcome, answers = play(domain, task, [turn("run", command="ls"), GOOD, DONE])
    assert outcome == Scored(1.0, {"as_recorded": 1.0}, "all tests as recorded")
    assert answers[0].split() == ["README.md", "shop", "tests"]
    outcome, _ = play(domain, task, [edit(FAULT, "RATE // 50"), DONE])
    assert outcome == Scored(0.0, {"as_recorded": 0.5}, "TestTax.test_a: FAILED, not PASSED")
    outcome, _ = play(
        domain,
        task,
        [
            edit("RATE = 20", f"RATE = 20\n\n\n{EQUAL}"),
            edit("return price + price * RATE // 1000", "return Any(price)"),
            DONE,
        ],
    )
    assert isinstance(outcome, Scored) and outcome.reward == 0.0
    fewer = dataclasses.replace(task, truth={**task.truth, "expected": {"TestTax.test_a": "PASSED"}})
    outcome, _ = play(domain, fewer, [GOOD, DONE])
    assert isinstance(outcome, Scored) and outcome.reason == "2 tests have results, 1 are recorded"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"FAIL_TO_PASS": None}, "names no FAIL_TO_PASS"),
        ({"FAIL_TO_PASS": ["test_tax (tests.TaxCase)"]}, "is no test id of pytest"),
        ({"FAIL_TO_PASS": ["-pcheat::test_x"]}, "is no test id of pytest"),
        ({"FAIL_TO_PASS": ["tests/\ud800.py::test_x"]}, "cannot be graded: 'utf-8' codec can't encode"),
        ({"FAIL_TO_PASS": ["tests/test_new.py::test_x"]}, "test file tests/test_new.py is not in the repository"),
        ({"test_patch": TEST_PATCH_OF_ANOTHER}, "test_patch does not apply"),
    ],
)
def test_rows_that_cannot_be_graded_are_no_fault_of_the_answer(
    domain: SweAgentic, clone: tuple[Path, str], fields: dict, reason: str
) -> None:
    task = domain.parse_row(row(clone[1], **fields), "rows:1")
    outcome, _ = play(domain, task, [GOOD, DONE])
    assert isinstance(outcome, Invalid) and reason in outcome.reason


def test_a_row_without_a_checkout_loses_its_own_rollouts_only(
    domain: SweAgentic, clone: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder or a commit that is not there, and git on a busy machine: no verdict, and the stage goes on."""
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 300\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(repository_module, "GIT_SECONDS", 0.5)
    slow = domain.parse_row(row(clone[1][:12], instance_id="slow-1"), "rows:1")
    assert played(domain, slow).endswith(f"base_commit {clone[1][:12]}: git rev-parse: no end within 0.5 s")
    monkeypatch.undo()
    nowhere = domain.parse_row(row(clone[1], instance_id="nowhere-1", repo_path="/no/such/folder"), "rows:1")
    assert "repo_path: no folder /no/such/folder" in played(domain, nowhere)
    assert f"acme__shop, base_commit {'0' * 40}: git" in played(domain, domain.parse_row(row("0" * 40), "rows:1"))


def played(domain: SweAgentic, task: Task) -> str:
    """Why a rollout of this task and its stored copy are Invalid: the same reason."""
    outcome, answers = play(domain, task, [GOOD, DONE])
    stored = domain.score(task, Transcript((GOOD, Message("tool", "ok"), DONE)))
    assert isinstance(outcome, Invalid) and outcome == stored and answers == []
    return outcome.reason


def test_what_is_missing_is_said_in_one_line(services: Services, clone: tuple[Path, str]) -> None:
    plain = SweAgentic(services, {"runtime": "bubblewrap"})
    task = plain.parse_row(row(clone[1]), "rows:1")
    with pytest.raises(
        UserError, match=r"acme__shop-7: this row's repository lives in a container image.*repositories"
    ):
        plain.begin(task)
    said = Transcript((turn("run", command="ls"), Message("tool", ""), DONE))
    assert isinstance(plain.score(task, said), Invalid)
    bare = SweAgentic(services, {"repositories": str(clone[0].parent), "packages": "/usr/bin"})
    with pytest.raises(UserError, match=r"packages: /usr/bin has no pytest.*pip install pytest"):
        bare.begin(bare.parse_row(row(clone[1]), "rows:1"))
    for key, value in (("runtime", "lxc"), ("cpus", 0.0), ("agent_timeout_s", -1.0), ("start_timeout_s", 0.0)):
        with pytest.raises(UserError, match=f"data.options.swe_agentic.{key}: "):
            SweAgentic(services, {key: value})
