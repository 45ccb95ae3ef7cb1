"""The graph, its order, and everything that is refused before a run."""

import dataclasses
from pathlib import Path

import pytest

from nemo_cascade.cascade import checks
from nemo_cascade.cascade import plan as planning
from nemo_cascade.cascade.graph import Source, build_graph
from nemo_cascade.cascade.plan import make_plan
from nemo_cascade.config.load import load_cascade
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import UserError
from tests.flow.small_cascade import write_cascade


@pytest.fixture
def cascade(tmp_path: Path) -> str:
    return str(write_cascade(tmp_path))


def wrong(cascade: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(load_cascade(cascade, overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_order_and_relations(cascade):
    graph = build_graph(load_cascade(cascade))
    assert graph.order == ("sft", "if_rl", "math_rl", "side", "mopd")
    assert graph.parents("mopd") == ["math_rl", "sft", "side", "if_rl"]
    assert graph.ancestors("math_rl") == {"sft", "if_rl"}
    assert graph.descendants("side") == {"mopd"}
    assert graph.sources["sft"] == Source("random")


def test_a_stage_listed_before_its_parent_runs_after_it(cascade):
    loaded = load_cascade(cascade, ["stages=[mopd, side, math_rl, if_rl, sft]"])
    assert build_graph(loaded).order == ("sft", "side", "if_rl", "math_rl", "mopd")


def test_the_shipped_cascade_has_the_papers_order():
    graph = build_graph(load_cascade("nano"))
    assert graph.order[0] == "sft"
    assert graph.order.index("rlhf_teacher") < graph.order.index("mopd")
    assert graph.order[graph.order.index("mopd") :] == (
        "mopd", "rlhf", "long_context_rl", "code_rl", "swe_agentless_rl", "swe_agentic_rl",
    )  # fmt: skip
    assert graph.descendants("sft") == set(graph.order) - {"sft"}


def test_a_step_that_another_stage_starts_from_is_kept_and_evaluated(cascade):
    plan = make_plan(
        load_cascade(cascade, ["stages.side.init=if_rl@4", "stages.mopd.teachers.candidates=[if_rl@2, sft]"])
    )
    assert plan.stages["if_rl"].keep_steps == [2, 4]
    assert plan.stages["if_rl"].evaluation.steps == [2, 4]
    assert plan.stages["sft"].keep_steps == []
    assert plan.graph.sources["side"].checkpoint == "if_rl@4"


def test_the_last_step_is_the_stage_itself(cascade):
    assert build_graph(load_cascade(cascade, ["stages.side.init=if_rl@6"])).sources["side"] == Source("stage", "if_rl")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.if_rl.init=sfft", "key 'init': no stage 'sfft' in this cascade; did you mean 'sft'?"),
        ("stages.sft.init=math_rl", "stages wait for each other: sft -> math_rl -> if_rl -> sft"),
        ("stages.sft.init=sft", "stages wait for each other: sft -> sft"),
        ("stages.if_rl.init=sft@5", "the step must be a number from 1 to 4"),
        ("stages.if_rl.init=sft@last", "the step must be a number from 1 to 4"),
        ("stages.mopd.teachers.candidates=[sft, iff_rl]", "no stage 'iff_rl' in this cascade; did you mean 'if_rl'?"),
        ("stages.mopd.teachers.candidates=[hf:nano]", "'hf:nano' is not a stage of this cascade"),
        ("stages.mopd.teachers.candidates=[]", "key 'teachers.candidates' is empty"),
        (
            "stages.mopd.teachers.pin={maths: sft}",
            "key 'teachers.pin.maths': not in data.domains; did you mean 'math'?",
        ),
        ("stages.mopd.teachers.candidates=[mopd]", "stages wait for each other: mopd -> mopd"),
        ("evaluation.select=0", "sft has no select score of 'math'"),
        ("stages.if_rl.data.domains={mathh: 1}", "no domain 'mathh'; did you mean 'math'?"),
        ("stages.if_rl.data.domains={math: 0}", "the weights sum to 0"),
        ("stages.if_rl.data.domains={math: -1}", "the weight -1.0 is negative"),
        ("stages.if_rl.data.domains={nowhere.py:Domain: 1}", "cannot be found"),
        ("stages.if_rl.data.files={math: [x.jsonl]}", "key 'data.files.math': not in data.domains"),
        ("stages.if_rl.data.files={instruction_following: [no.jsonl]}", "no file no.jsonl"),
        ("evaluation.domains=[maths, math, code, instruction_following]", "no domain 'maths'; did you mean 'math'?"),
        ("stages.if_rl.gates=[{domain: mcqa}]", "'mcqa' has no select tasks"),
        ("stages.if_rl.prompts_per_step=3", "3 is not a multiple of the 2 data-parallel replicas"),
        ("stages.if_rl.sampling.max_total_tokens=5000", "5000 is more than the model's 4096 positions"),
        ("stages.if_rl.sampling.max_prompt_tokens=64", "leaves no room for an answer"),
        ("stages.if_rl.micro_batch_tokens=32", "cannot hold one conversation"),
        ("stages.sft.max_sequence_tokens=5000", "5000 is more than the model's 4096 positions"),
        ("stages.sft.tokens_per_step=50", "cannot hold one conversation of max_sequence_tokens 64"),
        ("stages.sft.keep_steps=[9]", "key 'keep_steps': 9 is outside 1..4"),
        ("hardware.ranks_per_node=0", "key 'ranks_per_node': 0 is below 1"),
        ("hardware.pipeline_parallel=0", "key 'pipeline_parallel': 0 is below 1"),
        ("hardware.tensor_parallel=3", "2 ranks are not a multiple of"),
        ("hardware.expert_parallel=4", "4 does not divide the 2 ranks"),
        ("hardware.precision=hopper_fp8", "needs layer_spec te"),
        ("hardware.layer_spec=te", "te (Transformer Engine) has no fp32 attention"),
        ("model.hidden_sizes=3", "unknown key 'hidden_sizes'"),
        ("base=hf:nowhere", "nowhere is no Hugging Face folder"),
        ("base=sfft", "key 'base': no stage 'sfft'"),
    ],
)
def test_what_cannot_work_is_refused_before_it_runs(cascade, override, words):
    assert words in wrong(cascade, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("ranks_per_node=4", "tensor_parallel=4"), "key 'tensor_parallel': 4 does not divide the model's n_groups 2"),
        (("ranks_per_node=4", "pipeline_parallel=4"), "key 'pipeline_parallel': 4 does not divide the 6 layers"),
        (("ranks_per_node=6", "expert_parallel=3"), "key 'expert_parallel': 3 does not divide the model's n_routed"),
        (("context_parallel=2", "layer_spec=te"), "key 'context_parallel': 2 needs layer_spec local"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(cascade, overrides, words):
    assert words in wrong(cascade, *(f"hardware.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("stages.if_rl.loss.routing_replay=sampler", "hardware.sampler=trtllm"),
            "if_rl.yaml: key 'loss.routing_replay': sampler needs a sampler that reports the experts it used, which "
            "hardware.sampler trtllm does not; set it to learner",
        ),
        (
            ("stages.mopd.distill.routing_replay=sampler", "hardware.sampler=trtllm"),
            "mopd.yaml: key 'distill.routing_replay': sampler needs a sampler that reports",
        ),
        (
            ("stages.mopd.distill.routing_replay=sampler", "hardware.context_parallel=2"),
            "key 'distill.routing_replay': sampler does not work with hardware context_parallel above 1",
        ),
        (
            ("stages.if_rl.loss.routing_replay=learner", "hardware.pipeline_parallel=2"),
            "key 'loss.routing_replay': learner does not work with hardware pipeline_parallel above 1",
        ),
        (
            ("stages.if_rl.loss.routing_replay=learner", "model.hybrid_override_pattern=M*MM*M"),
            "key 'loss.routing_replay': learner needs layers of experts, the model has none",
        ),
        (
            ("stages.if_rl.loss.routing_replay=sampler", "model.n_routed_experts=256"),
            "sampler keeps expert numbers in a byte, the model has 256 experts",
        ),
        (("stages.if_rl.loss.routing_replay=engine",), "'engine' is not one of none, learner, sampler"),
    ],
)
def test_replay_that_cannot_work_is_refused(cascade, overrides, words):
    assert words in wrong(cascade, *overrides)


def test_a_sampler_that_cannot_report_experts_may_be_used_without(cascade):
    """Who lets the Learner record, or trains on what was recorded, needs no report."""
    make_plan(load_cascade(cascade, ["stages.if_rl.loss.routing_replay=learner", "hardware.sampler=trtllm"]))


def test_layers_that_fp8_leaves_out_are_listed(cascade):
    fp8 = ("hardware.precision=hopper_fp8", "hardware.layer_spec=te")
    assert "leaves no layer in FP8: mixer.in_proj: width 648 is" in wrong(cascade, *fp8, "model.hidden_size=72")
    loaded = load_cascade("nemotron_cascade_2", ["hardware.precision=hopper_fp8"])
    lines = list(checks.exemptions(loaded.hardware, make_plan(loaded).model))
    experts = [f"mlp.{kind}.linear_{side}" for kind in ("experts", "shared_experts") for side in ("fc1", "fc2")]
    modules = [line.split(" stays bf16: ")[0] for line in lines]
    assert modules == [f"hopper_fp8: {module}" for module in ("mixer.in_proj", *experts)]
    assert "width 5,152 after tensor_parallel 2 is no multiple of 128" in lines[0]
    assert "width 1,856 is no multiple of 128" in lines[1]  # experts are not cut over tensor-parallel ranks
    assert "width 1,856 after tensor_parallel 2 is no multiple of 128" in lines[3]
    assert list(checks.exemptions(load_cascade("nemotron_cascade_2").hardware, make_plan(loaded).model)) == []
    emulated = dataclasses.replace(loaded.hardware, precision="hopper_fp8_emulated", layer_spec="local")
    shown = list(checks.exemptions(emulated, make_plan(loaded).model))
    assert shown[0].startswith("hopper_fp8_emulated: mixer.in_proj is rounded, hopper_fp8 leaves it bf16: width 5,152")
    assert len(shown) == len(lines)


def test_a_cluster_cascade_is_planned_where_its_files_are_not():
    plan = make_plan(load_cascade("nemotron_cascade_2"))
    assert any("config.json is missing" in line for line in plan.missing)
    with pytest.raises(UserError, match="and .* more"):
        plan.refuse_missing()


def test_costs_by_hand(cascade):
    plan = make_plan(load_cascade(cascade))
    rows = {row.stage: row for row in planning.costs(plan)}
    assert (rows["sft"].sampled_tokens, rows["sft"].trained_tokens) == (0, 4 * 1024)
    assert (rows["if_rl"].sampled_tokens, rows["if_rl"].trained_tokens) == (6 * 2 * 2 * 8, 6 * 2 * 2 * 64)
    count = plan.model.parameter_count()
    assert rows["sft"].weights_gib == pytest.approx(4 * count / 2**30)
    assert rows["sft"].training_gib == pytest.approx(16 * count / 2**30)
    active = plan.model.active_parameter_count()
    hours = (6 * active * 1536 + 2 * active * 192 / 0.3) / 3.0e10 / 3600
    assert rows["if_rl"].device_hours == pytest.approx(hours)
    # Two ranks of one node without a GPU: the policy's training and a sampler of the whole model in both; mopd keeps
    # three teachers (of four candidates, one for each domain) and, while one is borrowed, the policy.
    assert rows["sft"].host_gib == pytest.approx(2 * (16 + 4) * count / 2**30)
    assert rows["mopd"].host_gib == pytest.approx(2 * (16 + 4 + 4 * (3 + 1)) * count / 2**30)
    assert rows["mopd"].parameters == count
    lines = planning.table(plan).splitlines()
    assert lines[0].split()[-4:] == ["params", "weights", "training", "host"]
    assert lines[5].split()[0] == "mopd"
    assert lines[5].split()[-4:] == [
        planning.human(count), *(f"{count * factor / 2**30:.3g}" for factor in (4, 16, 72))
    ]  # fmt: skip
    assert not any("FIT" in line or "fits" in line for line in lines)


def test_what_a_stage_borrows_lies_in_host_memory(cascade):
    def host(*overrides: str) -> float:
        plan = make_plan(load_cascade(cascade, ["hardware=cpu1", "hardware.sampler=remote", "hardware.sampler_url=u",
                                                *overrides]))  # fmt: skip
        row = next(row for row in planning.costs(plan) if row.stage == "if_rl")
        return row.host_gib * 2**30 / plan.model.parameter_count()

    assert host() == pytest.approx(16)
    assert host("stages.if_rl.loss.kl=0.1") == pytest.approx(16 + 4 * 2)
    assert host("stages.if_rl.loss.kl=0.1", "stages.if_rl.evaluation.steps=[2, 4]") == pytest.approx(16 + 4 * 4)
    assert host("stages.if_rl.evaluation.steps=[2, 4]", "hardware.sampler=local") == pytest.approx(16 + 4 * 3 + 4)


def test_whether_it_fits_is_said_for_device_and_host(cascade):
    def verdicts(*overrides: str) -> list[str]:
        lines = planning.table(make_plan(load_cascade(cascade, overrides))).splitlines()
        return [line for line in lines if line.startswith(("device:", "host, per node:"))]

    assert verdicts() == []
    roomy = verdicts("hardware.device_memory_gib=1", "hardware.host_memory_gib=2")
    assert [line.partition(" (")[0] for line in roomy] == ["device: fits in 1 GiB", "host, per node: fits in 2 GiB"]
    tight = verdicts("hardware.device_memory_gib=0.001", "hardware.host_memory_gib=0.05")
    assert tight[0].startswith("device: DOES NOT FIT in 0.001 GiB (sft takes ")
    assert tight[1].startswith("host, per node: DOES NOT FIT in 0.05 GiB (mopd takes ")


def test_memory_of_the_large_model_by_hand():
    loaded = load_cascade("nemotron_cascade_2")
    model = NemotronHConfig.from_mapping(loaded.model)
    hardware = dataclasses.replace(
        loaded.hardware,
        nodes=1,
        ranks_per_node=8,
        tensor_parallel=1,
        pipeline_parallel=1,
        context_parallel=1,
        expert_parallel=8,
    )
    experts = 23 * 128 * 2 * 2688 * 1856
    dense = model.parameter_count() - experts
    weights, training = planning.memory(model, hardware)
    assert weights == 2.0 * (dense + experts / 8)
    assert training == pytest.approx(weights + dense * (4 + 12 / 8) + experts / 8 * (4 + 12))
    _, whole = planning.memory(model, dataclasses.replace(hardware, distributed_optimizer=False))
    assert whole == pytest.approx(weights + (dense + experts / 8) * (4 + 12))


def test_human_numbers():
    assert [planning.human(value) for value in (7, 1500, 2.5e6, 3.1e9)] == ["7", "1.5K", "2.5M", "3.1G"]
