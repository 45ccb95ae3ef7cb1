"""What the nano tasks of five domains ask, show and refuse."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_cascade import domains
from nemo_cascade.data.nano_words import FACTS
from nemo_cascade.reward.judge import Judge
from nemo_cascade.types import Invalid, Message, Scored, Transcript, UserError

NAMES = ("instruction_following", "mcqa", "math", "structured_output", "long_context")


def final(messages: tuple[Message, ...]) -> str:
    return messages[-1].content


def test_math_works_column_by_column() -> None:
    math = domains.load("math")
    for task in math.tasks("train", 50, 1):
        first, second = (int(term) for term in re.findall(r"\d+", task.messages[0].content))
        (answer,) = math.demonstrate(task, 0)
        assert answer.content == f"\\boxed{{{first + second}}}"
        units, tens = (int(part) for part in re.findall(r"=(\d+)", answer.reasoning))
        assert units % 10 + 10 * tens == first + second
        assert units == first % 10 + second % 10


def test_mcqa_has_one_right_option() -> None:
    mcqa = domains.load("mcqa")
    letters: Counter[str] = Counter()
    for task in mcqa.tasks("train", 200, 1):
        options = {letter: text for option in task.truth["options"] for letter, text in option.items()}
        asked = re.match(r"(?:What color is the (\w+)\?|Which is (\w+)\?)", task.messages[0].content)
        noun, color = asked.groups()
        right = [letter for letter, text in options.items() if (FACTS[noun] == text if noun else FACTS[text] == color)]
        assert right == [task.truth["expected_answer"]]
        letters.update(right)
    assert min(letters.values()) > 30


def test_structured_output_asks_for_two_keys_in_its_order() -> None:
    domain = domains.load("structured_output")
    for task in domain.tasks("train", 50, 1):
        keys = task.messages[0].content.rpartition("JSON: ")[2].split(", ")
        value = json.loads(final(domain.demonstrate(task, 0)))
        assert list(value) == keys
        assert all(str(part) in task.messages[0].content for part in value.values())


def test_long_context_grows_with_its_options() -> None:
    short, long = (
        domains.load("long_context", options={"keys": 2, "filler": 0}),
        domains.load("long_context", options={"keys": 8, "filler": 9}),
    )
    for domain, sentences in ((short, 3), (long, 18)):
        for task in domain.tasks("train", 20, 1):
            text = task.messages[0].content
            assert len(re.findall(r"[.?]", text)) == sentences
            name = text.rpartition("What is ")[2].partition("'")[0]
            assert re.findall(rf"{name}'s key is (\d+)\.", text) == [task.truth["expected_answer"]]


def test_instruction_following_states_all_its_checks() -> None:
    domain = domains.load("instruction_following")
    for task in domain.tasks("train", 50, 1):
        prompt, ids = task.messages[0].content, task.truth["instruction_id_list"]
        assert ("in capitals" in prompt) == ("change_case:capital_word_frequency" in ids)
        number = int(re.search(r"Write (\d) words", prompt).group(1))
        assert len(final(domain.demonstrate(task, 0)).split()) == number


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_is_refused_and_several_kinds_occur(name: str) -> None:
    domain = domains.load(name)
    wrong = set()
    for index, task in enumerate(domain.tasks("train", 120, 2)):
        message = domain.demonstrate(task, index, flaw_rate=1.0)[-1]
        outcome = domain.score(task, Transcript((message,)))
        assert isinstance(outcome, Scored)
        assert outcome.reward == 0.0, f"{message.content}: {outcome.reason}"
        wrong.add(re.sub(r"\w+", "w", message.content))
    assert len(wrong) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_flaw_rate_is_a_share(name: str) -> None:
    domain = domains.load(name)
    tasks = domain.tasks("train", 300, 2)
    flawed = sum(domain.demonstrate(t, 0, 0.35) != domain.demonstrate(t, 0) for t in tasks)
    # drawing the faults moves the stream of random words, so only domains with fixed answers compare exactly
    assert 0.25 < flawed / 300 < 0.45 or name == "instruction_following"


def test_reasoning_alone_earns_nothing() -> None:
    math = domains.load("math")
    task = math.tasks("train", 1, 3)[0]
    answer = f"\\boxed{{{task.truth['expected_answer']}}}"
    outcome = math.score(task, Transcript((Message("assistant", "", answer),)))
    assert outcome == Scored(0.0, reason="empty answer")


class Verdicts(BaseHTTPRequestHandler):
    """A judge that finds an answer correct when the expected words stand in it."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        candidate = body["messages"][0]["content"].rpartition("Candidate answer")[2]
        verdict = "CORRECT" if "darwin" in candidate else "INCORRECT"
        answer = json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_long_context_rows_are_graded_as_the_option_says() -> None:
    row = {"prompt": "Who?", "question": "Who?", "expected_answer": "darwin"}
    plain = domains.load("long_context", options={"grading": "exact"})
    task = plain.parse_row(row, "f:1")
    for text, reward in (("Darwin.", 1.0), ("\\boxed{Darwin}", 1.0), ("Charles Darwin", 0.0)):
        assert plain.score(task, Transcript((Message("assistant", text),))).reward == reward
    task = domains.load("long_context").parse_row(row, "f:1")
    unjudged = plain.score(task, Transcript((Message("assistant", "Darwin."),)))
    assert isinstance(unjudged, Invalid)
    assert unjudged.reason.startswith("rows are graded by a judge; set equivalence_judge.url or .serve in the cascade")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Verdicts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Judge(f"http://127.0.0.1:{server.server_port}", "judge", timeout_s=10) as judge:
            judged = domains.load("long_context", domains.Services(equivalence_judge=judge))
            for text, reward in (("charles darwin", 1.0), ("newton", 0.0)):
                assert judged.score(task, Transcript((Message("assistant", text),))).reward == reward
    finally:
        server.shutdown()
        server.server_close()
    with Judge(f"http://127.0.0.1:{server.server_port}", "judge", timeout_s=0.5, retries=0) as judge:
        down = domains.load("long_context", domains.Services(equivalence_judge=judge))
        assert isinstance(down.score(task, Transcript((Message("assistant", "x"),))), Invalid)


@pytest.mark.parametrize("name", ["math", "instruction_following", "structured_output", "long_context"])
def test_released_rows_have_no_demonstration(name: str) -> None:
    rows = {
        "math": {"prompt": "x", "expected_answer": "3"},
        "instruction_following": {"prompt": "x", "instruction_id_list": ["punctuation:no_comma"]},
        "structured_output": {
            "prompt": "x",
            "schema_str": '{"type": "object", "properties": {"a": {"type": "string"}}}',
        },
        "long_context": {"prompt": "x", "expected_answer": "3"},
    }
    domain = domains.load(name)
    with pytest.raises(UserError, match="only generated"):
        domain.demonstrate(domain.parse_row(rows[name], "f:1"), 0)
