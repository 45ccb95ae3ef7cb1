"""What users get wrong: one line that names file, key and remedy, found before anything runs where that is possible.

Every case goes through the real command line in a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_cascade.cascade.plan import make_plan
from nemo_cascade.config.load import load_cascade
from nemo_cascade.config.strict import read_yaml
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import UserError
from tests.flow.real_cascade import ROOT, Cascade, environment

HEAD = (
    "name: real\nmodel: nano\nbase: random\nhardware: cpu1\n"
    "evaluation: {select: 0, report: 2, domains: [instruction_following], max_new_tokens: 4}\n"
)
SAMPLING = "sampling: {max_new_tokens: 8, max_prompt_tokens: 160, max_total_tokens: 256}\n"
SFT = (
    "kind: sft\ninit: base\nnum_steps: 1\ntokens_per_step: 1024\nmax_sequence_tokens: 320\n"
    "data: {domains: {math: 1}}\noptimizer: {lr: 1.0e-3}\n"
)
RL = (
    "kind: grpo\ninit: sft\nnum_steps: 1\nprompts_per_step: 2\ngroup_size: 2\n" + SAMPLING +
    "data: {domains: {math: 1}}\noptimizer: {lr: 1.0e-3}\n"
)  # fmt: skip
JUDGED = RL.replace("init: sft", "init: random").replace("math", "preference")
ONE_STAGE, TWO_STAGES = HEAD + "stages: [sft]\n", HEAD + "stages: [sft, rl]\n"
JUDGED_STAGE = HEAD + "stages: [judged]\n"


def cli(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_cascade.cli", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=300, check=False
    )


def refusal(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line on stderr of a command that was refused."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip("\n")


def check(tmp_path: Path, head: str = TWO_STAGES, *overrides: str, **stages: str) -> str:
    """What `nemo-cascade check` refuses about a cascade with these stage files."""
    files = {"sft": SFT, "rl": RL, "judged": JUDGED, **stages}
    return refusal(cli("check", str(Cascade(tmp_path, head, files).path), *overrides))


def test_a_right_cascade_passes(tmp_path):
    path = Cascade(tmp_path, TWO_STAGES, {"sft": SFT, "rl": RL}).path
    done = cli("check", str(path))
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_key(tmp_path):
    said = check(tmp_path, rl=RL + "colour: red\n")
    assert said.startswith(f"{tmp_path}/rl.yaml: key 'colour' unknown; known: kind, init, ")


def test_a_misspelt_key(tmp_path):
    said = check(tmp_path, rl=RL.replace("prompts_per_step", "prompt_per_step"))
    assert said == f"{tmp_path}/rl.yaml: key 'prompt_per_step' unknown; did you mean 'prompts_per_step'?"


def test_a_misspelt_override(tmp_path):
    said = check(tmp_path, TWO_STAGES, "stages.rl.optimiser.lr=1")
    assert said == "override 'stages.rl.optimiser.lr=1': key 'optimiser' unknown; did you mean 'optimizer'?"


def test_a_missing_data_file(tmp_path):
    said = check(tmp_path, rl=RL.replace("{math: 1}}", "{math: 1}, files: {math: [nowhere.jsonl]}}"))
    assert said == f"{tmp_path}/rl.yaml: key 'data.files.math': no file nowhere.jsonl"


NANO = ROOT / "conf" / "cascade" / "nano.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stages.sft.data.flaw_rates={maths: 0.0}",
            "conf/stage/nano/sft.yaml: key 'data.flaw_rates.maths': not in data.domains; did you mean 'math'?",
        ),
        (
            "stages.if_rl.data.options={long_context: {}}",
            "conf/stage/nano/if_rl.yaml: key 'data.options.long_context': not in data.domains; "
            "known: instruction_following",
        ),
        (
            "evaluation.options={long_contxt: {phrase: has}}",
            "conf/cascade/nano.yaml: key 'evaluation.options.long_contxt': not in evaluation.domains; "
            "did you mean 'long_context'?",
        ),
        (
            "stages.sft.evaluation.files={mqca: [a.jsonl]}",
            "conf/stage/nano/sft.yaml: key 'evaluation.files.mqca': not in evaluation.domains; did you mean 'mcqa'?",
        ),
        (
            "stages.long_context_rl.data.options={long_context: {phrse: has}}",
            "conf/stage/nano/long_context_rl.yaml: key 'data.options.long_context.phrse': no such option, "
            "did you mean 'phrase'?; known: keys, filler, phrase, grading, task, words",
        ),
        (
            "evaluation.options={long_context: {phrase: hsa}}",
            "conf/cascade/nano.yaml: key 'evaluation.options.long_context.phrase': 'hsa' is not one of key, has",
        ),
        (
            "stages.swe_agentless_rl.data.options={swe_agentless: {unreadable_reward: low}}",
            "conf/stage/nano/swe_agentless_rl.yaml: key 'data.options.swe_agentless.unreadable_reward': 'low' is not a "
            "number",
        ),
    ],
)
def test_a_misspelt_domain_or_option(override, said):
    with pytest.raises(UserError) as caught:
        make_plan(load_cascade(str(NANO), [override]))
    assert str(caught.value) == said


def test_a_stage_that_measures_less_keeps_the_options_of_its_cascade():
    plan = make_plan(load_cascade(str(NANO), ["stages.mopd.evaluation.domains=[math]"]))
    assert plan.stages["mopd"].evaluation.options == {"long_context": {"phrase": "has"}}


def test_init_from_a_stage_that_is_not_there(tmp_path):
    said = check(tmp_path, rl=RL.replace("init: sft", "init: stf"))
    assert said == f"{tmp_path}/rl.yaml: key 'init': no stage 'stf' in this cascade; did you mean 'sft'?"


def test_a_cycle(tmp_path):
    said = check(tmp_path, sft=SFT.replace("init: base", "init: rl"))
    assert said == (
        f"{tmp_path}/cascade.yaml: stages wait for each other: sft -> rl -> sft; change one 'init' or teacher"
    )


def test_preference_without_a_judge(tmp_path):
    said = check(tmp_path, JUDGED_STAGE)
    assert said.startswith(f"{tmp_path}/judged.yaml: key 'judge' is missing; groups of domain 'preference'")
    assert "set judge.serve" in said
    assert "judge.url" in said


def test_prompts_that_cannot_be_shared_out(tmp_path):
    said = check(tmp_path, TWO_STAGES, "stages.rl.prompts_per_step=3", "hardware.ranks_per_node=2")
    assert said == f"{tmp_path}/rl.yaml: key 'prompts_per_step': 3 is not a multiple of the 2 data-parallel replicas"


def test_fp8_without_transformer_engine(tmp_path):
    said = check(tmp_path, TWO_STAGES, "hardware.precision=hopper_fp8")
    assert said == "hardware cpu1: key 'precision': hopper_fp8 needs layer_spec te (Transformer Engine)"


def test_fp8_with_transformer_engine_is_checked_where_neither_it_nor_a_gpu_is(tmp_path):
    """A login node has none; what the stage's own machine lacks, `run` refuses there (test_trouble.py)."""
    path = Cascade(tmp_path, TWO_STAGES, {"sft": SFT, "rl": RL}).path
    done = cli("check", str(path), "hardware.layer_spec=te", "hardware.precision=hopper_fp8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hopper_fp8: mixer.in_proj stays bf16: width 648 is no multiple of 128")


def test_a_folder_without_a_checkpoint(tmp_path):
    said = check(tmp_path, sft=SFT.replace("init: base", f"init: hf:{tmp_path}"))
    assert said == f"{tmp_path}/sft.yaml: key 'init': {tmp_path} is no Hugging Face folder (config.json is missing)"


def test_training_on_rollouts_that_were_not_recorded(tmp_path):
    said = check(tmp_path, rl=RL + "mode: train_only\nrollouts: /nowhere\n")
    assert said == (
        f"{tmp_path}/rl.yaml: key 'rollouts': /nowhere holds no recorded rollouts (rollouts/step_*.jsonl); "
        "name the folder of a stage that sampled"
    )
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_000000.jsonl").touch()
    stage = RL + f"mode: train_only\nrollouts: {tmp_path}\n"
    said = check(tmp_path, rl=stage.replace("num_steps: 1", "num_steps: 3"))
    assert said.startswith(
        f"{tmp_path}/rl.yaml: key 'rollouts': {tmp_path} has no rollouts of step 1 and num_steps is 3; record every"
    )
    assert cli("check", str(Cascade(tmp_path, TWO_STAGES, {"sft": SFT, "rl": stage}).path)).returncode == 0


def test_a_sampler_that_is_not_on_this_machine(tmp_path):
    cascade = Cascade(tmp_path, TWO_STAGES, {"sft": SFT, "rl": RL})
    note = cli("check", str(cascade.path), "hardware.sampler=trtllm")
    assert (note.returncode, note.stderr) == (0, "")
    why = "hardware cpu1: key 'sampler': trtllm: TensorRT-LLM"
    assert note.stdout.startswith(f"not on this machine: {why}")
    assert "start a server in that container and set `sampler: remote` with `sampler_url`" in note.stdout
    assert refusal(cli("run", str(cascade.path), "hardware.sampler=trtllm")).startswith(why)
    assert not cascade.folder.exists()


def test_a_checkpoint_of_another_shape(tmp_path):
    model = NemotronHConfig.from_mapping(read_yaml(ROOT / "conf" / "model" / "nano.yaml"), "nano")
    folder = tmp_path / "wide"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**model.to_hf_json(), "hidden_size": 256}))
    said = check(tmp_path, sft=SFT.replace("init: base", f"init: hf:{folder}"))
    assert said == f"{tmp_path}/sft.yaml: key 'init': {folder}/config.json has not the shape of model 'nano'"


def test_a_checkpoint_without_its_tokenizer(tmp_path):
    model = {**read_yaml(ROOT / "conf" / "model" / "nano.yaml"), "vocab_size": 1024}
    folder = tmp_path / "mute"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(NemotronHConfig.from_mapping(model, "wider").to_hf_json()))
    said = check(tmp_path, TWO_STAGES, "model.vocab_size=1024", sft=SFT.replace("init: base", f"init: hf:{folder}"))
    assert said == (
        f"{tmp_path}/sft.yaml: key 'init': {folder}: no tokenizer.json, and the nano tokenizer has 512 tokens where "
        "the model has 1024; put the tokenizer of the model into a Hugging Face folder with its weights"
    )


def test_without_bubblewrap_the_run_is_refused_before_it_starts(tmp_path):
    cascade = Cascade(tmp_path, ONE_STAGE.replace("[instruction_following]", "[code]"), {"sft": SFT})
    said = refusal(cli("run", str(cascade.path), PATH=str(tmp_path)))
    assert said == (
        "domain 'code' runs code in bubblewrap (bwrap), which is not installed; run `apt-get install -y bubblewrap`"
    )
    assert not cascade.folder.exists()
    note = cli("check", str(cascade.path), PATH=str(tmp_path))
    assert (note.returncode, note.stderr) == (0, "")
    assert note.stdout.startswith(f"not on this machine: {said}\n")


def test_an_unwritable_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    said = refusal(cli("run", str(Cascade(tmp_path, ONE_STAGE, {"sft": SFT}).path), f"output={tmp_path}/file"))
    assert said.startswith(f"{tmp_path}/file/real/cascade.json: cannot be written (Not a directory)")


