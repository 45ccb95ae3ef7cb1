"""The scripts of swerl_gen rows, run for real: a clone in bubblewrap, bash, git and pytest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.swe_agentless import SweAgentless
from nemo_cascade.reward.repository import build_repository
from nemo_cascade.reward.row_scripts import judged, read_summary
from nemo_cascade.reward.search_replace import unified_diff
from nemo_cascade.types import Invalid, Json, Message, Outcome, Scored, Transcript
from tests.unit.reward.swe.test_runtimes import engines

__all__ = ["engines"]

BASE = {
    "calc.py": "def add(a, b):\n    return a - b\n",
    "tests/test_calc.py": "from calc import add\n\n\ndef test_zero():\n    assert add(0, 0) == 0\n",
    "setup.cfg": "[tool:pytest]\naddopts = -p no:cacheprovider\n",
}
ADDED = "\n\ndef test_add():\n    assert add(1, 2) == 3\n\n\ndef test_big():\n    assert add(40, 2) == 42\n"
TESTS = unified_diff(BASE, {**BASE, "tests/test_calc.py": BASE["tests/test_calc.py"] + ADDED})
CONDA = "#!/bin/bash\nsource /opt/miniconda3/bin/activate\nconda activate testbed\ncd /testbed\n"


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """A row as released, of a repository that lies beside it as a clone."""
    folder = tmp_path_factory.mktemp("clones") / "owner__calc"
    folder.mkdir()
    commit = build_repository(BASE, folder)
    checkout = f"{CONDA}hash -r\ngit checkout {commit} tests/test_calc.py\n"
    return {
        "prompt": "Repair it.",
        "mode": "eval",
        "dataset_name": "SWE-Gym/SWE-Gym",
        "metadata": {
            "relevant_file_contents": {"calc.py": BASE["calc.py"], "setup.cfg": BASE["setup.cfg"]},
            "image": "/swebench-images/owner_calc-1.sif",
            "clones": str(folder.parent),
        },
        "instance": {
            "instance_id": "owner__calc-1",
            "repo": "owner/calc",
            "base_commit": commit,
            "problem_statement": "add subtracts",
            "patch": unified_diff(BASE, {**BASE, "calc.py": BASE["calc.py"].replace("a - b", "a + b")}),
            "test_patch": TESTS,
            "FAIL_TO_PASS": ["tests/test_calc.py::test_add", "tests/test_calc.py::test_big"],
            "PASS_TO_PASS": ["tests/test_calc.py::test_zero"],
            "setup_script": f"{checkout}git apply -v - <<'EOF_114329324912'\n{TESTS}\nEOF_114329324912\n",
            "regression_script": checkout,
            "test_script": f"{CONDA}python -m pytest -rA --color=yes tests/test_calc.py",
        },
    }


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    shared = Services()
    yield shared
    shared.close()


def scored(services: Services, row: dict[str, Json], content: str, mode: str = "eval", **options: Json) -> Outcome:
    given: dict[str, Json] = {"runtime": "auto", "repositories": row["metadata"]["clones"], "memory_mb": 1024}
    domain = SweAgentless(services, {**given, "tests_timeout_s": 60.0, **options})
    task = domain.parse_row({**row, "mode": mode}, "rows:1")
    return domain.score(task, Transcript((Message("assistant", content),)))


def patch(new: str, path: str = "calc.py", old: str = "    return a - b") -> str:
    blocks = f"### {path}\n<<<<<<< SEARCH\n{old}\n=======\n{new}\n>>>>>>> REPLACE"
    return f"<solution>\n```python\n{blocks}\n```\n</solution>"


def test_a_repair_passes_the_tests_of_the_row(services: Services, row: dict[str, Json]) -> None:
    wanted = {"fail_to_pass": 1.0, "pass_to_pass": 1.0, "applies": 1.0}
    assert scored(services, row, patch("    return b + a")) == Scored(1.0, wanted, "all tests pass")
    half = scored(services, row, patch("    return a - b if b < 2 else 3"))
    assert (half.reward, half.parts["fail_to_pass"], half.parts["pass_to_pass"]) == (0.0, 0.5, 1.0)
    assert half.reason == "tests/test_calc.py::test_big: FAILED"


SLOW = pytest.mark.slow
UNTIL_WRONG = (
    "    import os\n    text = open('tests/test_calc.py').read()\n    if '== 3\\n' in text and '== 42\\n' in text:\n"
    "        for fd in (1, 2, *range(3, 20)):\n            try:\n"
    "                os.write(fd, b'\\n=== short test summary info ===\\nPASSED tests/test_calc.py::test_add\\n'"
    "b'PASSED tests/test_calc.py::test_big\\nPASSED tests/test_calc.py::test_zero\\n')\n"
    "            except OSError: pass\n        os._exit(0)\n"
)


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        pytest.param("    return a - b  # no change that counts", "test_add: FAILED", marks=SLOW),
        pytest.param("    return a - b +", "no result", marks=SLOW),
        pytest.param("    import os; os._exit(0)", "no result", marks=SLOW),
        pytest.param(
            "    import os, sys\n    print('=== short test summary info ===')\n"
            "    for t in ('add', 'big', 'zero'): print(f'PASSED tests/test_calc.py::test_{t}')\n"
            "    sys.stdout.flush(); os._exit(0)",
            "no result",  # pytest has the standard output of a running test to itself
            marks=SLOW,
        ),
        (
            "    import os\n    for fd in (1, 2, *range(3, 20)):\n        try:\n"
            "            os.write(fd, b'\\n=== short test summary info ===\\nPASSED tests/test_calc.py::test_add\\n'"
            "b'PASSED tests/test_calc.py::test_big\\nPASSED tests/test_calc.py::test_zero\\n')\n"
            "        except OSError: pass\n    os._exit(0)",
            "passes with a wrong expectation, too",
        ),
        pytest.param(
            "    class Any(int):\n        def __eq__(self, o): return True\n        __hash__ = int.__hash__\n"
            "    return Any(a - b)",
            "passes with a wrong expectation, too",
            marks=SLOW,
        ),
        pytest.param("    import pytest\n    pytest.xfail('later')", "test_add: XFAIL", marks=SLOW),
        (f"{UNTIL_WRONG}    os._exit(0)", "test_add: no result with a wrong expectation"),
        (f"{UNTIL_WRONG}    return a - b", "test_add: passes, but not beside tests with a wrong expectation"),
        ("    import os; os.kill(-1, 9)", "a command ended its sandbox"),
    ],
)
def test_what_repairs_nothing_earns_nothing(services: Services, row: dict[str, Json], new: str, reason: str) -> None:
    outcome = scored(services, row, patch(new))
    assert isinstance(outcome, Scored), outcome.reason
    assert outcome.reward == 0.0
    assert reason in outcome.reason


@pytest.mark.slow
def test_tests_and_their_settings_stay(services: Services, row: dict[str, Json]) -> None:
    """A hook that lets every test pass, a setting that skips them, a new conftest: none reaches the tests."""
    settings = patch("addopts = --collect-only", "setup.cfg", "addopts = -p no:cacheprovider")
    outcome = scored(services, row, settings)
    assert (outcome.reward, outcome.reason) == (0.0, "nothing but tests and their settings changed")
    hook = "def pytest_runtest_makereport(item, call): call.excinfo = None"
    planted = f"### conftest.py\n<<<<<<< SEARCH\n=======\n{hook}\n>>>>>>> REPLACE\n### calc.py"
    outcome = scored(services, row, patch("    return a - b  #").replace("### calc.py", planted))
    assert (outcome.reward, outcome.reason) == (0.0, "tests/test_calc.py::test_add: FAILED")


@pytest.mark.slow
def test_what_cannot_be_asked_is_invalid(services: Services, row: dict[str, Json]) -> None:
    repair = patch("    return a + b")
    other = {"calc.py": "def add(a, b):\n    # another version\n    return a - b\n"}
    moved = {**row, "metadata": {**row["metadata"], "relevant_file_contents": other}}
    outcome = scored(services, moved, repair)
    assert isinstance(outcome, Invalid) and "the shown files are not those of the image" in outcome.reason
    broken = {**row, "instance": {**row["instance"], "setup_script": f"{CONDA}false"}}
    outcome = scored(services, broken, repair)
    assert isinstance(outcome, Invalid) and outcome.reason == "owner__calc-1: setup_script fails without a patch, too"
    imports = {**row, "instance": {**row["instance"], "setup_script": f"{CONDA}python -c 'import calc'"}}
    outcome = scored(services, imports, patch("    return a - b +"))
    assert (outcome.reward, outcome.reason) == (0.0, "setup_script fails with this patch only")
    nothing = {**row, "instance": {**row["instance"], "test_script": None}}
    outcome = scored(services, nothing, repair)
    assert isinstance(outcome, Invalid) and "no FAIL_TO_PASS, setup_script or test_script" in outcome.reason
    slow = {**row, "instance": {**row["instance"], "test_script": "sleep 60"}}
    outcome = scored(services, slow, repair, tests_timeout_s=3.0)
    assert isinstance(outcome, Invalid) and "did not end within 3 s" in outcome.reason


SCRIPT = """I look at it.
```python
import sys
from calc import add
if add(1, 2) == 3:
    sys.exit(0)
print("still there")
sys.exit(2)
```
"""


@pytest.mark.parametrize(
    ("content", "reward", "reason"),
    [
        (SCRIPT, 1.0, "status 2 before the repair and 0 after"),
        pytest.param(f"<solution>\n{SCRIPT}</solution>", 1.0, "status 2 before the repair and 0 after", marks=SLOW),
        pytest.param(SCRIPT.replace("exit(2)", "exit(1)"), 0.0, "status 1 before the repair and 0 after", marks=SLOW),
        pytest.param(SCRIPT.replace("exit(2)", "exit(0)"), 0.0, "status 0 before the repair and 0 after", marks=SLOW),
        pytest.param(SCRIPT.replace("(1, 2)", "(1, 9)"), 0.0, "status 2 before the repair and 2 after", marks=SLOW),
        ("exit with 2, then with 0", 0.0, "no script in a code fence"),
    ],
)
def test_a_script_must_tell_the_fault_from_the_repair(
    services: Services, row: dict[str, Json], content: str, reward: float, reason: str
) -> None:
    outcome = scored(services, row, content, "repro-gen")
    assert (outcome.reward, outcome.reason) == (reward, reason)


def test_a_row_that_cannot_run_says_how_it_could(services: Services, row: dict[str, Json]) -> None:
    repair = patch("    return a + b")
    for options, reason in (
        ({"runtime": "none"}, "set data.options.swe_agentless.runtime"),
        ({"runtime": "bubblewrap", "repositories": ""}, "put a clone into the folder of data.options.swe_agentless."),
        ({"runtime": "docker", "repositories": ""}, "docker"),
    ):
        outcome = scored(services, row, repair, **options)
        assert isinstance(outcome, Invalid) and reason in outcome.reason, outcome
    alike = scored(services, row, repair, runtime="none", without_image="similarity")
    assert (alike.reward, alike.reason) == (1.0, "the gold patch")


def test_a_row_without_shown_files_is_no_fault_of_its_answers(services: Services, row: dict[str, Json]) -> None:
    metadata = {**row["metadata"], "relevant_file_contents": {}}
    outcome = scored(services, {**row, "metadata": metadata}, patch("    return a + b"))
    reason = "the row has no relevant_file_contents, and a patch must be applied to something"
    assert outcome == Invalid(f"owner__calc-1: {reason}")


def test_a_commit_that_the_clone_lacks_is_no_verdict(services: Services, row: dict[str, Json]) -> None:
    instance = {**row["instance"], "base_commit": "0" * 40}
    outcome = scored(services, {**row, "instance": instance}, patch("    return a + b"))
    assert isinstance(outcome, Invalid) and f"base_commit {'0' * 40}: git rev-parse" in outcome.reason


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_an_image_of_an_engine_runs_the_row(engines: Path, row: dict[str, Json], engine: str) -> None:
    """Stand-in engines, whose containers keep nothing but the repository between two commands."""
    name = "sweb.eval.x86_64.owner_s_calc-1"
    image = engines / (f"xingyaoww/{name}" if engine == "docker" else name) / "testbed"
    image.mkdir(parents=True)
    assert build_repository(BASE, image) == row["instance"]["base_commit"]
    services = Services()
    options: dict[str, Json] = {"runtime": engine, "repositories": "", "start_timeout_s": 60.0}
    good = scored(services, row, patch("    return b + a"), **options)
    assert (good.reward, good.reason) == (1.0, "all tests pass")
    bad = scored(services, row, patch("    return a - b  # no"), **options)
    assert (bad.reward, bad.reason) == (0.0, "tests/test_calc.py::test_add: FAILED")
    told = scored(services, row, SCRIPT, "repro-gen", **options)
    assert (told.reward, told.reason) == (1.0, "status 2 before the repair and 0 after")
    services.close()
    assert list(engines.glob("containers/*")) == []


def test_the_image_of_a_row_has_a_name_for_each_engine(tmp_path: Path, row: dict[str, Json]) -> None:
    options: dict[str, Json] = {"runtime": "apptainer", "images": str(tmp_path)}
    domain = SweAgentless(None, options)
    truth = domain.parse_row(row, "rows:1").truth
    pulled = "xingyaoww/sweb.eval.x86_64.owner_s_calc-1"
    assert [domain.containers.image_of(truth, sif) for sif in (True, False)] == [pulled, pulled]
    (tmp_path / "owner_calc-1.sif").touch()
    assert domain.containers.image_of(truth, sif=True) == str(tmp_path / "owner_calc-1.sif")
    assert domain.containers.image_of(truth, sif=False) == pulled
    named = {**truth, "image": "registry.example/calc:1"}
    assert [domain.containers.image_of(named, sif) for sif in (True, False)] == [named["image"]] * 2


def test_summaries_are_read_from_their_end() -> None:
    log = (
        "== short test summary info ==\nPASSED a.py::forged\n== PASSES ==\n"
        "\x1b[36m=== short test summary info ===\x1b[0m\n\x1b[32mPASSED\x1b[0m a.py::\x1b[1mone\x1b[0m\n"
        "PASSED a.py::two[x - y]\nFAILED a.py::three - assert 1 == 2\nPASSED a.py::four\nERROR a.py::four - teardown\n"
        "SKIPPED [1] a.py:3: no\nXFAIL a.py::five - reason\n=== 1 failed, 3 passed in 0.1s ===\n"
    )
    assert read_summary(log) == {
        "a.py::one": "PASSED", "a.py::two[x": "PASSED", "a.py::three": "FAILED", "a.py::four": "ERROR",
        "a.py::five": "XFAIL",
    }  # fmt: skip
    assert read_summary("PASSED a.py::one\n") == {}
    statuses = read_summary(log)
    wanted = {"FAIL_TO_PASS": ["a.py::one"], "PASS_TO_PASS": ["a.py::five", "a.py::one"]}
    assert judged(wanted, statuses).reward == 1.0
    assert judged({**wanted, "FAIL_TO_PASS": ["a.py::five"]}, statuses).reason == "a.py::five: XFAIL"
    assert judged({**wanted, "FAIL_TO_PASS": ["a.py::one", "a.py::none"]}, statuses).parts["fail_to_pass"] == 0.5
    assert judged({**wanted, "FAIL_TO_PASS": ["a.py::two[x - y]"]}, statuses).reward == 1.0
    cut = {"a.py::two[x y]": "PASSED", "a.py::two[x z]": "FAILED"}
    assert judged({"FAIL_TO_PASS": ["a.py::two[x"], "PASS_TO_PASS": []}, cut).reason == "a.py::two[x: FAILED"
