"""Software: patches, rows with a repository, tool calls in containers, and what containers print."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from nemo_cascade.data import repair_prompts
from nemo_cascade.data.rows import too_deep
from nemo_cascade.domains import Services, swe_agentic, swe_agentless
from nemo_cascade.reward import repair_judge, repository, repository_grader, row_scripts
from nemo_cascade.reward.control_tests import controls
from nemo_cascade.reward.repair_judge import Repair, grade_repair, repair_prompt
from nemo_cascade.reward.runtimes import ContainerLost, Machine, Place, Ran, apptainer, docker
from nemo_cascade.reward.search_replace import BadEdit, similarity, unified_diff
from nemo_cascade.reward.swe import grading, instance, patch, released, workspace
from nemo_cascade.reward.swe.checkout import folder_of
from nemo_cascade.reward.verdicts import question_key
from nemo_cascade.types import Json, Message, Task, ToolCall, UserError
from tools.fuzz import grammars
from tools.fuzz.calls import calls_of
from tools.fuzz.catalogue import as_bytes, parser

# --- patches ----------------------------------------------------------------------------------------------------------

LONG = "".join(f"def f{number}(x):\n    return x + {number % 7}\n\n" for number in range(200))
FILES = {"a.py": "x = 1\ny = 2\ndef cat(x): return x+2\n", "b/c.py": "z = 3", "empty.py": "", "long.py": LONG}
GOLD = {**FILES, "a.py": "x = 2\ny = 2\ndef cat(x): return x-2\n"}
GOLD_DIFF = unified_diff(FILES, GOLD)


def _patched(text: str) -> object:
    patched = swe_agentless._patched(FILES, text)
    repository.content_key(patched)
    broken = [path for path, content in patched.items() if not repository_grader._compiles(content)]
    return broken, similarity(FILES, patched, GOLD), grade_repair(None, Repair("", FILES, GOLD_DIFF, GOLD), patched)


_MODULES = "reward.search_replace domains.swe_agentless reward.repository_grader reward.repair_judge"
parser("edits", grammars.EDITS, "swe_agentless", _MODULES, (BadEdit,))(_patched)
parser("diffs", grammars.DIFFS, "swe_agentless", _MODULES, (BadEdit,))(_patched)


@parser("names in patches", grammars.DIFFS, "swe_agentic swe_agentless", "reward.swe.patch data.repair_prompts")
def _names(text: str) -> object:
    """The paths of an agent's patch and of a known repair."""
    content = as_bytes(text)
    command = patch.model_patch_command(patch.touched(content), patch.sources_of(content))
    try:
        return command, [repair_prompts.is_test(path) for path in repair_prompts.changed_paths(text)]
    except ValueError:  # its caller names the row
        return command


@parser("repair prompts", grammars.JUDGED, "swe_agentless", "reward.repair_judge reward.verdicts")
def _repair_prompts(text: str) -> object:
    """The judge's prompt from a hostile issue, file, repair and patch; the key of its verdict."""
    prompt = repair_prompt(Repair(text, {text[:99]: text}, text), text)
    return question_key("judge", {"prompt": prompt, "samples": 1})


@parser("repair verdicts", grammars.VERDICTS, "swe_agentless", "reward.repair_judge")
def _repair_verdicts(text: str) -> object:
    return repair_judge.parse_verdict(text)


# --- rows -------------------------------------------------------------------------------------------------------------


@parser(
    "software rows", grammars.SOFTWARE_ROWS, "swe_agentic swe_agentless",
    "reward.swe.instance reward.swe.checkout reward.runtimes.docker reward.runtimes.apptainer data.repair_rows "
    "data.retrieval", (UserError,),
)  # fmt: skip
def _software_rows(text: str) -> object:
    """A row as both domains read it, with made and with given prompts; its image and its folder."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or too_deep(row):
        return None
    found: list[object] = []
    refused: UserError | None = None
    for domain in (swe_agentic.SweAgentic(), *_AGENTLESS):
        try:
            task = domain.parse_row(row, "row")
        except UserError as error:
            refused = error
            continue
        image = instance.image_of(task.truth)
        names = (docker.IMAGE_NAME.fullmatch(image), apptainer._image(image))
        full = docker.DockerRuntime(Machine(), "podman").full_name(image)
        truth = {"repo": "", **task.truth, "repo_path": ""}
        places = (instance.sif_of(truth, "/"), folder_of(truth, "/"))
        found.append((task, names, full, places))
    if not found and refused is not None:
        raise refused
    return found


_AGENTLESS = tuple(
    swe_agentless.SweAgentless(options=options)
    for options in ({"prompts": "both"}, {"prompts": "row", "reward": "similarity"}, {"prompts": "row"})
)

# --- containers -------------------------------------------------------------------------------------------------------

_SECRET = re.compile(rb"[0-9a-f]{32}")


class _Saying:
    """A container whose commands all print one text, and whose files all hold it. `nonce` in the text stands for what
    the run was told to put before its report: code under test may know it.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def run(self, argv: Sequence[str], seconds: float, stdin: bytes = b"", most_bytes: int = 1 << 20) -> Ran:
        """Print the text; fail where a file or a folder is looked for."""
        secret = _SECRET.search(stdin)
        said = self.text.replace("nonce", secret.group().decode()) if secret else self.text
        return Ran(int(argv[0] in ("ls", "test")), as_bytes(said)[:most_bytes], as_bytes(self.text)[:most_bytes])

    def read(self, path: str, most_bytes: int = 16 << 20) -> bytes:
        """The text, whatever the path."""
        return as_bytes(self.text)[:most_bytes]

    def write(self, path: str, content: bytes) -> None:
        """Nothing is kept."""

    def out_of_memory(self) -> bool:
        """Never."""
        return False

    def stop(self) -> None:
        """Nothing was started."""


class _Engine:
    """A runtime of such containers."""

    name = "docker"

    def __init__(self, text: str) -> None:
        self.text = text

    def check(self) -> None:
        """It works."""

    def start(self, place: Place) -> _Saying:
        """A container."""
        return _Saying(self.text)

    def close(self) -> None:
        """Nothing was started."""


TRUTH: dict[str, Json] = {
    **{"instance_id": "o__r-1", "repo": "o/r", "base_commit": "c", "mode": "eval", "image": "o/r", "patch": GOLD_DIFF},
    **{"FAIL_TO_PASS": ["test_a.py::test_cat"], "PASS_TO_PASS": ["test_a.py::test_b"]},
    **{"setup_script": "true", "test_script": "pytest -rA", "regression_script": "true"},
}
MANY: dict[str, Json] = {**TRUTH, "PASS_TO_PASS": [f"test_a.py::test_old[{n}" for n in range(400)]}  # cut at blanks
RECORDED: dict[str, Json] = {
    "instance_id": "o__r-2", "expected": {"test_cat": "PASSED", "Test.test_b - x": "FAILED"},
    "hidden_tests": {"r2e_tests/__init__.py": "", "r2e_tests/test_1.py": "def test_cat(): assert f(1) == 2\n"},
}  # fmt: skip


@parser("control tests", grammars.TEST_FILES, "swe_agentic swe_agentless", "reward.control_tests")
def _control_tests(text: str) -> object:
    """A test file as a container shows it."""
    return controls({"test_a.py": text}, ["test_a.py::test_cat", "test_a.py::T::test_b"])


@parser(
    "container reports", grammars.REPORTS, "swe_agentic", "reward.swe.grading", (grading.BadInstance, ContainerLost)
)  # fmt: skip
def _container_reports(text: str) -> object:
    """What pytest's runner prints in a container, and the test files there."""
    statuses = grading.read_report(text, "nonce")
    repair = GOLD_DIFF.encode()
    recorded = grading.grade_patch(lambda: _Saying(text), RECORDED, repair, 1.0)
    return recorded, grading.grade_patch(lambda: _Saying(text), TRUTH, repair, 1.0), grading.judged(MANY, statuses)


@parser("test summaries", grammars.SUMMARIES, "swe_agentless", "reward.row_scripts reward.row_containers")
def _test_summaries(text: str) -> object:
    """What a row's own scripts print, and a script that shows the fault."""
    domain = swe_agentless.SweAgentless(Services(), {"runtime": "docker", "repositories": ""})
    containers = domain.containers
    containers._runtimes.runtimes[("docker", containers._machine, "")] = _Engine(text)
    assert containers.missing(TRUTH) == ""
    images = [containers.image_of({**TRUTH, "image": image}, True) for image in (text, f"{text}.sif")]
    verdicts = containers.grade_repair(TRUTH, FILES, GOLD), containers.grade_reproduction(TRUTH, text)
    return verdicts, images, row_scripts.judged(MANY, row_scripts.read_summary(text)), row_scripts.last_fence(text)


@parser("workspace calls", grammars.WORKSPACE_CALLS, "swe_agentic", "reward.swe.workspace reward.swe.released")
def _workspace_calls(text: str) -> object:
    """Calls of the tools on a released row's repository, in a container that answers with the calls themselves."""
    tools = workspace.Workspace(_Saying(text), 300.0, 16_000)
    calls = tuple(ToolCall(*call) for call in calls_of(text))
    answers = tuple(Message("tool", tools.call(call, 9.0)) for call in calls)
    said = (Message("assistant", text, "", calls), *answers)
    return released.transcript_key(Task("t", "swe_agentic", (), (), False, {}), said, 0)


@parser("test reports", grammars.REPORTS, "swe_agentless swe_agentic", "reward.repository")
def _reports(text: str) -> object:
    return repository._read_report(text, "nonce")
