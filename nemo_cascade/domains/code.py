"""Programs that must pass hidden tests: reward 1 when every test passes, else 0; the first failing test ends the run.

Python, and C and C++ where rows or the option `language` ask for it and a compiler is installed.

Three kinds of rows. Calls: a function's return values are compared outside the sandbox (nano tasks, LiveCodeBench's
`fn_name`). Programs: standard output is compared line by line, as in LiveCodeBench (released rows). Assertions: the row
brings a test program (HumanEval), which calls the candidate in another process. An exit status never decides: a program
that leaves early has returned nothing, which is not the right value.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import ClassVar

from nemo_cascade.data import rows, splits
from nemo_cascade.domains import Services, SingleTurn, content_of, make_task, unanswered
from nemo_cascade.reward import assertions
from nemo_cascade.reward.compiled import ALIASES, LANGUAGES, NoCompiler, NotCompiled, run_compiled
from nemo_cascade.reward.sandbox import CallResult, Limits, RunResult
from nemo_cascade.types import Case, Invalid, Json, Message, Outcome, Scored, Split, Task, Transcript, UserError

FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
KNOWN = ("python", *LANGUAGES)
HIDDEN_INPUTS = (0, 1, 9, 25, 40)
CONSTANTS = {"+": range(1, 10), "-": range(1, 10), "*": range(2, 6)}
REMEMBERED = 4096  # verdicts kept per process: rollouts of a group often agree, and evaluation repeats them

LONGEST_NUMBERS = 1 << 20  # characters of a line whose numbers are compared as such

ALL = """
def __all(lists):
    return [ENTRY(*given) for given in lists]
"""
"""All calls of a nano task in one process: a process costs more than its few calls."""


class Code(SingleTurn):
    """Python programs judged by hidden tests in the sandbox (the code stage)."""

    name = "code"
    DEFAULTS: ClassVar[Mapping[str, Json]] = {
        "cpu_seconds": 10.0,  # per test, as NeMo-Gym's unit_test_timeout_secs
        "memory_mb": 1024,
        "max_tests": 50,
        "compare": "lines",  # as in LiveCodeBench and NeMo-Gym; "tokens": white space between tokens never counts
        "language": "python",  # of rows that name none; cpp and c where a compiler is installed
    }

    def __init__(self, services: Services | None = None, options: Mapping[str, Json] | None = None) -> None:
        super().__init__(services, options)
        seconds = float(self.options["cpu_seconds"])
        self.limits = Limits(seconds, max(30.0, 3 * seconds), int(self.options["memory_mb"]), output_bytes=1 << 22)
        if self.options["compare"] not in COMPARISONS:
            raise UserError(f"data.options.code.compare: {self.options['compare']!r}; choose lines or tokens")
        if self.options["language"] not in KNOWN:
            known = ", ".join(KNOWN)
            raise UserError(f"data.options.code.language: {self.options['language']!r}; choose one of {known}")
        self._verdicts: OrderedDict[tuple[str, str], Outcome] = OrderedDict()

    def tasks(self, split: Split, count: int, seed: int) -> list[Task]:
        """`Find f: f(3)=15 f(8)=40`, where f adds, subtracts or multiplies by a small constant."""
        return splits.draw(_make, content_of, split, count, seed)

    def demonstrate(self, task: Task, seed: int, flaw_rate: float = 0.0) -> tuple[Message, ...]:
        """The rule checked on both examples, then the function.

        Faults: a rule that fits the first example alone, a constant off by one, a forgotten return, chat around it.
        """
        if "examples" not in task.truth:
            raise UserError(f"task {task.id}: only generated code tasks have demonstrations")
        rng = random.Random(f"{task.id}/{seed}")
        (first, value), (second, other) = task.truth["examples"]
        rule = str(task.truth["rule"])
        lines = [f"{first}{rule}={value}", f"{second}{rule}={other}"]
        body = f"return x{rule}"
        if rng.random() < flaw_rate:
            wrong, constant = rule, int(rule[1:])
            fault = rng.choice(("first", "constant", "return", "chat"))
            if fault == "first":
                wrong = _overfit(first, value, rule)
                lines = [f"{first}{wrong}={value}"]
            elif fault == "constant":
                wrong = f"{rule[0]}{constant + 1}"
            body = f"x{rule}" if fault == "return" else f"return x{wrong}"
            code = f"def f(x): {body}"
            content = f"Hello. {code} Bye." if fault == "chat" else code
        else:
            content = f"def f(x): {body}"
        return (Message("assistant", content, " ".join(lines) if task.thinking else ""),)

    def parse_row(self, row: Mapping[str, Json], row_id: str) -> Task:
        """A released row (`verifier_metadata.unit_tests`, or `unit_tests` at the top) or a HumanEval row."""
        if "entry_point" in row:
            prompt, entry = rows.field(row, "prompt", str, row_id), rows.field(row, "entry_point", str, row_id)
            request = f"Write the whole function in Python.\n\n```python\n{prompt}```"
            truth: dict[str, Json] = {
                "stub": prompt,
                "entry_point": entry,
                "test": rows.field(row, "test", str, row_id),
            }
            task_id = str(row.get("task_id", row_id))
            return Task(task_id, self.name, (Message("user", request),), (), True, truth)
        tests = rows.loose_json(rows.verifier_field(row, "unit_tests"), "unit_tests", row_id)
        if not isinstance(tests, Mapping):
            raise UserError(f"{row_id}: field 'unit_tests' must be an object with inputs and outputs")
        inputs, outputs = (rows.field(tests, key, list, f"{row_id} unit_tests") for key in ("inputs", "outputs"))
        if not inputs or len(inputs) != len(outputs):
            raise UserError(f"{row_id}: unit_tests has {len(inputs)} inputs but {len(outputs)} outputs")
        name, language = tests.get("fn_name"), self._language(row, row_id)
        if name and language != "python":
            raise UserError(f"{row_id}: field 'fn_name' needs language python, the row's is {language!r}")
        if name:
            _require_json(inputs, outputs, row_id)
        truth = {"inputs": inputs, "outputs": outputs, "language": language, **({"fn_name": name} if name else {})}
        return Task(str(row.get("hash_id", row_id)), self.name, rows.input_messages(row, row_id), (), True, truth)

    def _language(self, row: Mapping[str, Json], row_id: str) -> str:
        """The row's `language`, else the option's; UserError for one that nobody here runs."""
        given = str(rows.verifier_field(row, "language") or self.options["language"]).lower()
        language = ALIASES.get(given, given)
        if language not in KNOWN:
            raise UserError(f"{row_id}: field 'language' is {given!r}; known: {', '.join(KNOWN)}")
        return language

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        """1 when all tests pass. Wall-clock expiry is Invalid: a busy machine is not the program's fault."""
        refused = unanswered(transcript)
        if refused is not None:
            return refused
        source = extract_code(transcript.final.content)
        key = (task.id, source)
        known = self._verdicts.get(key)
        if known is not None:
            return known
        outcome = self._run(task, source)
        if isinstance(outcome, Scored):
            self._verdicts[key] = outcome
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        return outcome

    def _run(self, task: Task, source: str) -> Outcome:
        language = str(task.truth.get("language") or "python")
        problem = _broken(source, language)
        if problem:
            return Scored(0.0, reason=problem)
        if "test" in task.truth:
            return self._assertions(task, source)
        limit = int(self.options["max_tests"])
        inputs, outputs = task.truth["inputs"][:limit], task.truth["outputs"][:limit]
        if "fn_name" in task.truth:
            name, given = str(task.truth["fn_name"]), [_arguments(value) for value in inputs]
            wanted = [_value(value) for value in outputs]
            if task.truth.get("one_process"):
                source, name = f"{source}\n{ALL.replace('ENTRY', name)}", "__all"
                given, wanted = [[list(given)]], [wanted]

            def fails(index: int, result: CallResult) -> bool:
                return result.status != "ok" or result.value != wanted[index]

            sandbox = self.services.code_sandbox()
            calls = sandbox.call_function(source, name, given, self.limits, fails)
            return _verdict([(r.status, not fails(i, r)) for i, r in enumerate(calls)], len(given))

        same = COMPARISONS[str(self.options["compare"])]

        def differs(index: int, result: RunResult) -> bool:
            return result.status != "ok" or not same(result.stdout, str(outputs[index]))

        sandbox, stdins = self.services.code_sandbox(), [str(x) for x in inputs]
        if language == "python":
            results = sandbox.run_programs(source, stdins, self.limits, differs)
        else:
            try:
                results = run_compiled(sandbox, LANGUAGES[language], source, stdins, self.limits, differs)
            except NotCompiled as error:
                return Scored(0.0, reason=f"not compiled: {error}")
            except NoCompiler as error:
                return Invalid(str(error))
        return _verdict([(r.status, not differs(i, r)) for i, r in enumerate(results)], len(inputs))

    def _assertions(self, task: Task, source: str) -> Outcome:
        """Run the row's own test program; the candidate answers its calls from another process, which has no tests.

        Passing means that `check` returned: the candidate can neither end the test's process nor speak for it.
        """
        entry, stub = str(task.truth["entry_point"]), f"{task.truth['stub']}    pass\n"
        candidate = f"{stub}{source}\n{_ends()}__ends['serve']({entry})\n"
        asked = f"{_ends()}{entry} = __ends['ask']\n"  # some tests call the function by its own name
        tests = f"{stub}{asked}{task.truth['test']}\ndef __graded():\n    check({entry})\n    return True\n"
        result = self.services.code_sandbox().call_beside(tests, "__graded", candidate, self.limits)
        outcome = _verdict([(result.status, result.value is True)], 1)
        if isinstance(outcome, Invalid) or outcome.reward or not result.error:
            return outcome
        return Scored(0.0, outcome.parts, f"{outcome.reason}: {result.error}"[:200])

    def cases(self) -> list[Case]:
        """All three kinds of rows, and the usual tricks: tables of examples, early exits, forged equality."""
        return _cases()


@functools.cache
def _ends() -> str:
    """Lines that bring both ends of `reward/assertions.py` into a program, under one name."""
    text = Path(assertions.__file__).read_text(encoding="utf-8")
    return f"__ends = {{'__name__': 'assertions'}}\nexec({text!r}, __ends)\n"


def extract_code(content: str) -> str:
    """The last fenced block, else the whole answer; an opened fence that never closes holds no code."""
    blocks = FENCE.findall(content)
    if blocks:
        return blocks[-1].strip("\n")
    return "" if "```" in content else content.strip()


def _broken(source: str, language: str) -> str:
    """Why the source cannot run at all, found without starting a sandbox; compiling Python executes nothing."""
    if not source:
        return "no code"
    if len(source) > 1 << 16:
        return "over 64 KiB of code"
    if language != "python":
        return ""
    try:
        compile(source, "solution.py", "exec", dont_inherit=True)
    except SyntaxError as error:
        return f"syntax error: {error.msg}"
    except (ValueError, RecursionError, MemoryError, OverflowError):  # null bytes, absurd nesting, absurd numbers
        return "the source cannot be compiled"
    return ""


def _verdict(tests: list[tuple[str, bool]], wanted: int) -> Outcome:
    """The outcome of (status, passed) per test; `wanted` tests were asked for, fewer ran when one failed."""
    passed = sum(ok for _, ok in tests)
    if tests[-1][0] == "wall_time":
        return Invalid("the sandbox's wall clock expired before a test ended")
    parts = {"tests_passed": float(passed), "tests": float(wanted)}
    if passed == wanted:
        return Scored(1.0, parts, f"all {wanted} tests pass")
    status = tests[-1][0]
    return Scored(0.0, parts, f"test {len(tests)}: {'another result' if status == 'ok' else status}")


def same_lines(printed: str, wanted: str) -> bool:
    """As many lines on both sides, each the same text without the spaces around it, or the same decimal numbers.

    LiveCodeBench's rule: white space around the whole output does not count, a blank line within it does, and `1.50 2`
    is `1.5  2.0`, while two spaces between words are not one.
    """
    ours, theirs = printed.strip().split("\n"), wanted.strip().split("\n")
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(printed: str, wanted: str) -> bool:
    if printed.strip() == wanted.strip():
        return True
    if len(printed) > LONGEST_NUMBERS:
        return False
    try:
        ours, theirs = ([Decimal(word) for word in line.split()] for line in (printed, wanted))
    except InvalidOperation:
        return False
    return len(ours) == len(theirs) and not any(number.is_nan() for number in ours) and ours == theirs


def same_tokens(printed: str, wanted: str) -> bool:
    """The same words in the same order, on whatever lines."""
    return printed.split() == wanted.split()


COMPARISONS: Mapping[str, Callable[[str, str], bool]] = {"lines": same_lines, "tokens": same_tokens}


def _arguments(value: Json) -> list[Json]:
    """Arguments of one call: a list as it is, or LiveCodeBench's text with one JSON value per line."""
    return value if isinstance(value, list) else [json.loads(line) for line in str(value).split("\n") if line.strip()]


def _value(value: Json) -> Json:
    """An expected value: text holds JSON, as in LiveCodeBench."""
    return json.loads(value) if isinstance(value, str) else value


def _require_json(inputs: Sequence[Json], outputs: Sequence[Json], row_id: str) -> None:
    """UserError for a call whose arguments or expected value are text but not JSON: better now than in a rollout."""
    for key, values, read in (("inputs", inputs, _arguments), ("outputs", outputs, _value)):
        for index, value in enumerate(values):
            try:
                read(value)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{row_id} unit_tests: {key}[{index}] is not JSON, as a row with fn_name needs: {error}"
                ) from error


def apply_rule(rule: str, x: int) -> int:
    """The value of a rule such as `*5` at x."""
    constant = int(rule[1:])
    return {"+": x + constant, "-": x - constant, "*": x * constant}[rule[0]]


def _make(rng: random.Random) -> Task:
    """Two examples fix the rule: lines x+k, x-k and x*k cross at one point at most."""
    operator = rng.choice(tuple(CONSTANTS))
    rule = f"{operator}{rng.choice(CONSTANTS[operator])}"
    return _task(rule, *sorted(rng.sample(range(2, 31), 2)))


def _task(rule: str, first: int, second: int) -> Task:
    examples: list[Json] = [[x, apply_rule(rule, x)] for x in (first, second)]
    prompt = "Find f: " + " ".join(f"f({x})={apply_rule(rule, x)}" for x in (first, second))
    truth: dict[str, Json] = {
        "fn_name": "f",
        "one_process": True,
        "inputs": [[x] for x in HIDDEN_INPUTS],
        "outputs": [apply_rule(rule, x) for x in HIDDEN_INPUTS],
        "examples": examples,
        "rule": rule,
    }
    return make_task(Code.name, prompt, truth)


def _overfit(first: int, value: int, rule: str) -> str:
    """Another rule that fits the first example: what a model writes that never looks at the second."""
    if rule[0] == "*":
        return f"+{value - first}"
    if value % first == 0 and value > first:
        return f"*{value // first}"
    return f"{rule[0]}{int(rule[1:]) + 1}"


def _cases() -> list[Case]:
    nano = _task("*5", 3, 8)
    unit: dict[str, Json] = {"inputs": ["2\n3 4\n", "1\n9\n"], "outputs": ["7\n", "9"]}
    program = Task("code-case-program", Code.name, (Message("user", "Add the numbers of line two."),), (), True, unit)
    asserted: dict[str, Json] = {
        "stub": "def half(x):\n",
        "entry_point": "half",
        "test": "def check(candidate):\n    assert candidate(6) == 3\n    assert candidate(9) == 4\n",
    }
    humaneval = Task("code-case-asserted", Code.name, (Message("user", "Halve x, rounding down."),), (), True, asserted)
    anything = "class Any(int):\n    def __eq__(self, other): return True\ndef half(x): return Any(1)"

    def case(task: Task, content: str, reward: float, because: str, hack: bool = False) -> Case:
        return Case(task, Transcript((Message("assistant", content, "3*5=15"),)), reward, because, hack)

    add = "input()\nprint(sum(map(int, input().split())))"
    return [
        case(nano, "def f(x): return x*5", 1.0, "the rule"),
        case(nano, "Here it is:\n```python\ndef f(x):\n    return 5 * x\n```\n", 1.0, "fenced, with words before"),
        case(program, add, 1.0, "reads stdin, prints the sum"),
        case(humaneval, "def half(x): return x // 2", 1.0, "passes the row's assertions"),
        case(nano, "def f(x): return x+12", 0.0, "fits the first example only"),
        case(nano, "def f(x): x*5", 0.0, "returns nothing"),
        case(nano, "Hello. def f(x): return x*5 Bye.", 0.0, "chat around the code"),
        case(program, "print(7)", 0.0, "the second test differs"),
        case(nano, "def f(x): return {3: 15, 8: 40}[x]", 0.0, "a table of the shown examples", hack=True),
        case(nano, "import os\nos._exit(0)\ndef f(x): return 0", 0.0, "leaves with status 0", hack=True),
        case(nano, "def f(x):\n    print(x*5)\n    raise SystemExit(0)", 0.0, "prints and leaves", hack=True),
        case(program, add.replace("input()\n", "input(); print('ok')\n", 1), 0.0, "claims success", hack=True),
        case(humaneval, "import sys\ndef half(x): sys.exit(0)", 0.0, "leaves before the assertions", hack=True),
        case(humaneval, anything, 0.0, "a value equal to everything", hack=True),
        case(
            humaneval,
            "def half(x): return 1\ndef check(c): pass",
            0.0,
            "redefines the test",
            hack=True,
        ),
    ]


DOMAIN = Code
