"""Code: hidden tests in the sandbox decide; examples shown, exit statuses and claims do not."""

import json
import os
from pathlib import Path

import pytest

from nemo_cascade.domains import Services
from nemo_cascade.domains.code import Code, apply_rule, extract_code, same_lines, same_tokens
from nemo_cascade.reward.compiled import LANGUAGES, Language
from nemo_cascade.reward.sandbox import Limits
from nemo_cascade.types import Invalid, Message, Transcript, UserError
from tools.public_rows import OPTIONS, check_humaneval, humaneval_rows


@pytest.fixture(scope="module")
def services():
    services = Services()
    yield services
    services.close()


@pytest.fixture(scope="module")
def domain(services):
    return Code(services)


def answer(text):
    return Transcript((Message("assistant", text),))


def data():
    folder = os.environ.get("NEMO_CASCADE_DATA")
    if not folder:
        pytest.skip("NEMO_CASCADE_DATA is not set: no released rows at hand")
    return Path(folder)


def test_every_case(domain):
    for case in domain.cases():
        assert domain.score(case.task, case.transcript).reward == case.reward, case.because


def test_flawless_and_flawed_demonstrations(domain):
    tasks = domain.tasks("train", 10, seed=3)
    assert all(domain.score(t, Transcript(domain.demonstrate(t, 1))).reward == 1.0 for t in tasks)
    assert not any(domain.score(t, Transcript(domain.demonstrate(t, 1, 1.0))).reward for t in tasks)


def test_the_examples_leave_one_rule(domain):
    rules = [f"{sign}{k}" for sign in "+-*" for k in range(1, 30) if (sign, k) != ("*", 1)]
    for task in domain.tasks("report", 200, seed=0):
        fits = [rule for rule in rules if all(apply_rule(rule, x) == y for x, y in task.truth["examples"])]
        assert fits == [task.truth["rule"]]


def test_a_wrong_program_stops_at_its_first_failing_test(domain):
    row = {"unit_tests": {"inputs": ["1", "2", "3"], "outputs": ["1", "5", "3"]},
           "responses_create_params": {"input": [{"role": "user", "content": "Echo."}]}}  # fmt: skip
    outcome = domain.score(domain.parse_row(row, "rows:1"), answer("print(input())"))
    assert outcome.reward == 0.0
    assert outcome.parts == {"tests_passed": 1.0, "tests": 3.0}


def test_endless_programs_fail_by_cpu_time_and_hung_ones_are_invalid(services):
    domain = Code(services, {"cpu_seconds": 0.3})
    task = domain.tasks("train", 1, seed=0)[0]
    assert domain.score(task, answer("def f(x):\n    while True: pass")).reason == "test 1: cpu_time"
    domain.limits = Limits(cpu_seconds=0.3, wall_seconds=0.3)
    assert isinstance(domain.score(task, answer("import time\ndef f(x): time.sleep(9)")), Invalid)


def test_fn_name_rows_compare_values(domain):
    tests = {"fn_name": "Solution.add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]}
    row = {
        "verifier_metadata": {"unit_tests": tests},
        "responses_create_params": {"input": [{"role": "user", "content": "Add."}]},
    }
    task = domain.parse_row(row, "rows:1")
    assert domain.score(task, answer("class Solution:\n    def add(self, a, b): return a + b")).reward == 1.0
    assert domain.score(task, answer("class Solution:\n    def add(self, a, b): return 3")).reward == 0.0


def test_extract_code():
    assert extract_code("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2"
    assert extract_code("def f(x): return x") == "def f(x): return x"
    assert extract_code("```python\nx = 1") == ""  # cut off: no program


def test_broken_rows_name_the_field(domain):
    prompt = {"responses_create_params": {"input": [{"role": "user", "content": "x"}]}}
    with pytest.raises(UserError, match="unit_tests"):
        domain.parse_row(prompt, "rows:1")
    with pytest.raises(UserError, match="2 inputs but 1 outputs"):
        domain.parse_row({**prompt, "unit_tests": {"inputs": ["1", "2"], "outputs": ["1"]}}, "rows:1")
    with pytest.raises(UserError, match=r"code\.compare"):
        Code(None, {"compare": "words"})


def test_humaneval_reference_solutions_pass_and_mutants_of_them_fail(domain):
    rows = humaneval_rows(data())
    assert len(rows) == 164
    checked = check_humaneval(rows[:6], domain)
    assert [one.problem for one in checked if one.problem] == []
    assert [one.name for one in checked] == [row["task_id"] for row in rows[:6]]


@pytest.mark.slow
def test_all_of_humaneval(services):
    """164 reference solutions pass, 164 mutants of them, which the tests are known to notice, fail."""
    checked = check_humaneval(humaneval_rows(data()), Code(services, OPTIONS))
    assert len(checked) == 164
    assert [one.problem for one in checked if one.problem] == []


CPP = """
#include <iostream>
int main() { long long n, sum = 0, x; std::cin >> n; while (n--) { std::cin >> x; sum += x; } std::cout << sum; }
"""


def cpp_task(domain, **fields):
    unit = {"inputs": ["2\n3 4\n", "1\n9\n"], "outputs": ["7\n", "9"]}
    prompt = {"responses_create_params": {"input": "Add the numbers of line two."}}
    return domain.parse_row({**prompt, "unit_tests": unit, "language": "C++", **fields}, "rows:1")


@pytest.mark.skipif(LANGUAGES["cpp"].program() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("source", "reward", "reason"),
    [
        (CPP, 1.0, "all 2 tests pass"),
        (CPP.replace("sum += x", "sum = 7"), 0.0, "test 2: another result"),
        (CPP.replace("sum = 0", "sum = zero"), 0.0, "not compiled: main.cpp:2:"),
        ("int main() { return 3; }", 0.0, "test 1: nonzero"),
        ("int main() { for (;;); }", 0.0, "test 1: cpu_time"),
        ("#include <vector>\nint main() { std::vector<char> v(3000000000u, 1); return v[5] - 1; }", 0.0, "test 1: "),
        ('#include "/proc/self/environ"\nint main() {}', 0.0, "not compiled"),
    ],
)
def test_cpp_rows(services, source, reward, reason):
    domain = Code(services, {"cpu_seconds": 1.0})
    outcome = domain.score(cpp_task(domain), answer(f"Here:\n```cpp\n{source}\n```"))
    assert outcome.reward == reward
    assert outcome.reason.startswith(reason), outcome.reason


def test_languages_of_rows_are_checked(domain, monkeypatch):
    with pytest.raises(UserError, match="rows:1: field 'language' is 'cobol'; known: python, cpp, c"):
        cpp_task(domain, language="cobol")
    with pytest.raises(UserError, match=r"code\.language: 'perl'"):
        Code(None, {"language": "perl"})
    tests = {"fn_name": "f", "inputs": ["1"], "outputs": ["1"]}
    with pytest.raises(UserError, match="'fn_name' needs language python"):
        cpp_task(domain, unit_tests=tests)
    monkeypatch.setattr(Language, "program", lambda self: None)
    outcome = domain.score(cpp_task(domain), answer(CPP))
    assert isinstance(outcome, Invalid) and "install g++" in outcome.reason


@pytest.mark.parametrize(
    ("printed", "wanted", "lines", "tokens"),
    [
        ("7\n", "7", True, True),
        ("\n 1 2 \n3\n\n", "1 2\n 3", True, True),
        ("1.50 2\n", "1.5  2.0", True, False),
        ("1e3", "1000", True, False),
        ("a  b", "a b", False, True),
        ("1\n\n2", "1\n2", False, True),
        ("1 2 3", "1\n2\n3", False, True),
        ("1 2", "1 2 3", False, False),
        ("0.1", "0.10000001", False, False),
        ("NaN", "nan", False, False),
        ("sNaN", "1", False, False),
        ("NaN", "NaN", True, True),
        ("1" * 5000, "1" * 5000 + ".0", True, False),
        ("1" * (1 << 21), "1", False, False),
        ("yes", "YES", False, False),
        ("", "", True, True),
    ],
)
def test_output_is_compared_as_livecodebench_does(printed, wanted, lines, tokens):
    assert same_lines(printed, wanted) is lines
    assert same_tokens(printed, wanted) is tokens


def test_layout_counts_unless_tokens_are_asked_for(services):
    row = {"unit_tests": {"inputs": ["1 2"], "outputs": ["1\n2"]},
           "responses_create_params": {"input": [{"role": "user", "content": "One a line."}]}}  # fmt: skip
    for options, reward in (({}, 0.0), ({"compare": "lines"}, 0.0), ({"compare": "tokens"}, 1.0)):
        domain = Code(services, options)
        assert domain.score(domain.parse_row(row, "rows:1"), answer("print(input())")).reward == reward


def test_line_comparison_gives_the_rewards_that_nemo_gym_recorded(services):
    domain = Code(services, {"max_tests": 100})
    folder = data() / "gym"
    rows = [json.loads(line) for line in (folder / "code_gen.example.jsonl").open()]
    rollouts = [json.loads(line) for line in (folder / "code_gen.example_rollouts.jsonl").open()]

    def prompt(row):
        return row["responses_create_params"]["input"][0]["content"]

    by_prompt = {prompt(row): domain.parse_row(row, "row") for row in rows}
    ours = [domain.score(by_prompt[prompt(r)], answer(r["extracted_model_output"])).reward for r in rollouts]
    assert ours == [r["reward"] for r in rollouts] == [0.0, 1.0, 0.0, 0.0, 0.0]
