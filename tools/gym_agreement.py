"""Do our verdicts agree with those that NeMo-Gym recorded? One line for every recorded rollout.

    python -m tools.gym_agreement [--write]     NEMO_CASCADE_DATA names the folder that holds gym/ and workplace/

Every answer is read from its Responses object, scored by our domain at its default options, and compared. Rewards that
a judge gave are counted apart: no judge is here, so `grading: exact` stands for it, the one option set. A difference
needs a measured reason in EXPLANATIONS: without one, or with one that is no longer needed, the exit status is 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_cascade import domains
from nemo_cascade.data.responses import transcript_of
from nemo_cascade.data.rows import content_text, read_jsonl
from nemo_cascade.protocols import Domain
from nemo_cascade.reward.math_equal import MathGrader
from nemo_cascade.types import Invalid, Json, Task, Transcript, UserError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gym_agreement.md"
RECORDED = ".example_rollouts.jsonl"
Row = Mapping[str, Json]

EXPLANATIONS: dict[tuple[str, int], str] = {
    ("equivalence_llm_judge", 4): "GPT-4o let 'Charles Darwin' pass for 'darwin'; without a judge the texts must be "
    "equal",
}
"""(environment, index in its file) -> why the two verdicts differ, as measured."""

PREMISES = {
    "code_gen": "the first 50 tests of a row are run, which is the default (`max_tests`); NeMo-Gym ran all",
    "equivalence_llm_judge": "NeMo-Gym asked GPT-4o; no judge here, so the boxed texts are compared",
    "genrm_compare": "prompts only, no answer and no reward is recorded; every row is parsed",
    "structured_outputs": "the recording lacks `schema_str`; the schema is read out of the prompt",
    "swerl_gen": "the repositories live in container images that cannot run here, so every row is parsed and only "
    "answers cut off by the token limit (reward 0 on both sides) can be compared",
    "workplace_assistant": "the recording lacks `ground_truth`; the reference calls are ours, from the request",
}
OPTIONS: dict[str, dict[str, Json]] = {"long_context": {"grading": "exact"}}
JUDGED = ("equivalence_llm_judge",)
"""Environments whose recorded rewards are a judge's: what equal texts give is shown beside them."""


def _call(name: str, **arguments: Json) -> Json:
    return {"name": name, "arguments": arguments}


CRM = "customer_relationship_manager"
REFERENCES: dict[str, list[Json]] = {
    "Create a bar chart of total visits since November 30": [
        _call("analytics_create_plot", time_min="2023-11-30", time_max="2023-11-30", value_to_plot="total_visits",
              plot_type="bar")
    ],
    "We need to move all customers that haven't responded to a proposal for the consulting product in 3 weeks to lost. "
    "Can you update the CRM?": [],  # the tables hold no such customer
    "Delete Casey Wilson from the crm": [_call(f"{CRM}_delete_customer", customer_id="00000014")],
    "Add Dakota Thomas as a new lead in the crm and assign them to Nadia": [
        _call(f"{CRM}_add_customer", customer_name="Dakota Thomas", assigned_to_email="nadia.moreau@atlas.com",
              status="Lead")
    ],
    "Delete my last email from kofi": [_call("email_delete_email", email_id="00000259")],
}  # fmt: skip
"""What the recorded workplace requests ask for; the tables of the data folder and the date in the prompt decide."""


@dataclass(frozen=True)
class Line:
    """One recorded rollout. `theirs` and `ours` are rewards; None where there is none to compare."""

    name: str
    index: int
    theirs: float | None
    ours: float | None
    reason: str

    @property
    def compared(self) -> bool:
        """Both sides have a reward."""
        return self.theirs is not None and self.ours is not None

    @property
    def agrees(self) -> bool:
        """The rewards are equal, or there is nothing to compare."""
        return not self.compared or self.theirs == self.ours


def recorded(folder: Path) -> list[str]:
    """The environments with recorded rollouts below gym/."""
    found = sorted(path.name.removesuffix(RECORDED) for path in (folder / "gym").glob(f"*{RECORDED}"))
    if not found:
        raise UserError(f"{folder / 'gym'}: no *{RECORDED} there; NEMO_CASCADE_DATA must name the folder of gym/")
    return found


def compare(folder: Path) -> list[Line]:
    """Every recorded rollout of the folder, scored by our domains."""
    services = domains.Services(math=MathGrader(cpu_seconds=60, wall_seconds=300))
    options = {**OPTIONS, "tool_use": {"workplace_tables": str(folder / "workplace")}}
    try:
        lines: list[Line] = []
        for name in recorded(folder):
            kind = domains.for_row({"agent_ref": {"name": name}})
            lines += compare_file(folder, name, domains.load(kind, services, options.get(kind)))
        return lines
    finally:
        services.close()


def compare_file(folder: Path, name: str, domain: Domain) -> Iterator[Line]:
    """One environment's recorded rollouts in the order of the file."""
    released = {_prompt(row): row for _, row in read_jsonl(folder / "gym" / f"{name}.example.jsonl")}
    for index, (where, rollout) in enumerate(read_jsonl(folder / "gym" / f"{name}{RECORDED}")):
        row = {**released.get(_prompt(rollout), {}), **rollout, **_rebuilt(name, rollout)}
        task = domain.parse_row(row, where)
        response, reward = rollout.get("response"), rollout.get("reward")
        if not isinstance(response, Mapping) or not isinstance(reward, (int, float)):
            turns = "1 turn" if len(task.messages) == 1 else f"{len(task.messages)} turns"
            yield Line(name, index, None, None, f"parsed: {turns}")
            continue
        ours, reason = _scored(domain, task, transcript_of(response, where))
        yield Line(name, index, float(reward), ours, reason)


def _scored(domain: Domain, task: Task, transcript: Transcript) -> tuple[float | None, str]:
    outcome = domain.score(task, transcript)
    if isinstance(outcome, Invalid):
        return None, f"parsed, not graded: {outcome.reason}"
    return outcome.reward, outcome.reason


def _prompt(row: Row) -> str:
    """The text of the last prompt message, which recorded rollouts and released rows share."""
    params = row["responses_create_params"]
    assert isinstance(params, Mapping)
    return content_text(params["input"][-1]["content"], "prompt")


def _rebuilt(name: str, rollout: Row) -> dict[str, Json]:
    """Verifier fields that the recording left out, from what it kept."""
    if name == "structured_outputs":
        return {"schema_str": json.dumps(schema_in(rollout)), "schema_type": "json"}
    if name == "workplace_assistant":
        return {"ground_truth": REFERENCES[_prompt(rollout)]}
    return {}


def schema_in(rollout: Row) -> dict[str, Json]:
    """The largest JSON object in the prompt: a schema, or the `properties` of one."""
    params = rollout["responses_create_params"]
    assert isinstance(params, Mapping)
    decoder, largest, length = json.JSONDecoder(), None, 0
    for message in params["input"]:
        text, at = content_text(message["content"], "prompt"), -1
        while (at := text.find("{", at + 1)) >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                continue
            if end - at > length:
                largest, length = value, end - at
            at = end - 1
    if largest is None:
        raise UserError("structured_outputs: no JSON object in the prompt of a recorded rollout")
    return largest if "properties" in largest else {"type": "object", "properties": largest}


def problems(lines: Sequence[Line], explained: Mapping[tuple[str, int], str]) -> list[str]:
    """What makes the check fail: differences without a reason, and reasons without a difference."""
    differ = {(line.name, line.index): line for line in lines if not line.agrees}
    found = [
        f"{name}[{index}]: NeMo-Gym {line.theirs:g}, ours {line.ours:g} ({line.reason}); no explanation"
        for (name, index), line in differ.items()
        if (name, index) not in explained
    ]
    present = {line.name for line in lines}
    stale = [key for key in explained if key[0] in present and key not in differ]
    return found + [f"{name}[{index}]: explained, but the verdicts agree" for name, index in stale]


def page(lines: Sequence[Line], explained: Mapping[tuple[str, int], str]) -> str:
    """The table as Markdown, with what each comparison rests on."""
    compared = [line for line in lines if line.compared]
    judged = [line for line in compared if line.name in JUDGED]
    own = [line for line in compared if line.name not in JUDGED]
    agree = sum(line.agrees for line in own)
    share = 100 * agree / max(1, len(own))
    text = [
        "# Agreement with the rewards that NeMo-Gym recorded",
        "",
        "Written by `python -m tools.gym_agreement --write` from the example rollouts of NVIDIA-NeMo/Gym (Apache-2.0).",
        "",
        f"{agree} of {len(own)} recorded rewards that need neither a judge nor a container image are ours, too "
        f"({share:.0f} %). Of {len(judged)} that a judge gave, {sum(line.agrees for line in judged)} are what equal "
        f"texts give. {len(lines) - len(compared)} recordings have nothing to compare.",
        "",
        "| environment | index | NeMo-Gym | ours | agree | our reason | why they differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        verdict = ("yes" if line.agrees else "no") if line.compared else "-"
        why = "" if line.agrees else explained.get((line.name, line.index), "UNEXPLAINED")
        cells = (line.name, str(line.index), _number(line.theirs), _number(line.ours), verdict, line.reason, why)
        text.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    names = dict.fromkeys(line.name for line in lines)
    text += ["", "What a comparison rests on:", ""]
    text += [f"- `{name}`: {PREMISES[name]}." for name in names if name in PREMISES]
    return "\n".join(text) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _cell(text: str) -> str:
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= 200 else f"{short[:197]}..."


def main(arguments: Sequence[str]) -> int:
    """Print the table, write it with --write; 0 when every difference is explained."""
    place = os.environ.get("NEMO_CASCADE_DATA")
    if not place:
        print("NEMO_CASCADE_DATA is not set: it names the folder that holds gym/ and workplace/", file=sys.stderr)
        return 2
    lines = compare(Path(place))
    text = page(lines, EXPLANATIONS)
    print(text)
    if "--write" in arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    wrong = problems(lines, EXPLANATIONS)
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
