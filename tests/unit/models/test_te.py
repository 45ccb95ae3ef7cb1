"""The te spec without Transformer Engine: megatron-core's wrappers around a stand-in of its layers, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_cascade.models import convert, names, nemotron_h
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.nemotron_h import NemotronH
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.spec import layer_spec
from nemo_cascade.types import UserError

HERE = Path(__file__).parent


SCALES = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}


def on_stand_ins(*words: str, kernels: bool = False, **variables: str) -> str:
    """Run in a process where Transformer Engine (and mamba-ssm) are the stand-ins; returns what it printed."""
    folders = ["te_standin", *(["mamba_standin"] if kernels else [])]
    path = os.pathsep.join([*(str(HERE / folder) for folder in folders), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_te_spec_on_the_stand_in_is_the_local_one() -> None:
    """One published state dict for both; same logits and gradients in bf16 where both use the same experts."""
    said = on_stand_ins(str(HERE / "te_worker.py"))
    assert said.endswith("39 parameters with one name, one value and one gradient in both specs\n")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "variables"), [("hopper_fp8", SCALES), ("blackwell_mxfp8", {})])
def test_te_spec_asks_for_fp8_where_the_profile_says(precision: str, variables: dict[str, str]) -> None:
    """Projections and experts of the middle layers, in the profile's recipe, whole blocks of tokens, nothing else."""
    said = on_stand_ins(str(HERE / "te_fp8_worker.py"), precision, kernels=True, **variables)
    assert f"{precision}: difference to the emulation" in said


UPDATES = """
from nemo_cascade.learner.megatron import LearnerSettings, MegatronLearner
import sys, torch
from nemo_cascade.algorithms.loss import cross_entropy
from nemo_cascade.config.schema import HardwareConfig, OptimizerConfig
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import Sequence
hardware = HardwareConfig(distributed_optimizer=sys.argv[1] == "distributed")
settings = LearnerSettings(OptimizerConfig(lr=1e-3, clip_grad=0.1), 4, hardware=hardware)
learner = MegatronLearner(NemotronHConfig.preset("nano"), settings)
rows = [Sequence(tuple(range(20, 20 + length)), (1,) * length) for length in (9, 30)]
found = [learner.update(rows, cross_entropy("token")) for _ in range(3)]
print([(step["loss"], step["grad_norm"]) for step in found])
"""


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["whole", "distributed"])
def test_transformer_engine_without_a_card_trains_in_pytorch(optimizer: str) -> None:
    """As in the container on a machine without a GPU: its optimizers are there and would fail."""
    said = on_stand_ins("-c", UPDATES, optimizer)
    path, threads = os.pathsep.join(sys.path), {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    alone = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UPDATES, optimizer],
        env={**os.environ, "PYTHONPATH": path, **threads}, capture_output=True, text=True, timeout=400, check=True,
    )  # fmt: skip
    assert said == alone.stdout and said.startswith("[(6.")


REFUSED = """
import os
from nemo_cascade.models.precision import check_installed
from nemo_cascade.types import UserError
def say():
    try:
        check_installed("hopper_fp8", "te")
    except UserError as error:
        print(error)
check_installed("blackwell_mxfp8", "te")
say()
import transformer_engine
os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"
say()
"""


@pytest.mark.slow
def test_scales_by_powers_of_two_are_refused() -> None:
    """Transformer Engine chooses them at import, where the variable is not set by then."""
    unset = {name: "" for name in SCALES}
    missing, late = on_stand_ins("-c", REFUSED, **unset).splitlines()
    assert missing == (
        "hardware.precision: hopper_fp8 needs NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 in the environment; set it"
    )
    assert "hopper_fp8: Transformer Engine was imported before" in late and late.endswith("before the process starts")


class Grouped(torch.nn.Module):
    """Expert weights as Transformer Engine's grouped linear layers hold them: weight0, weight1, ..."""

    def __init__(self, stacked: torch.Tensor) -> None:
        super().__init__()
        for expert, weight in enumerate(stacked):
            self.register_parameter(f"weight{expert}", torch.nn.Parameter(weight.detach().clone()))


def test_names_know_both_forms_of_the_experts(model: NemotronH, config: NemotronHConfig) -> None:
    stacked = dict(convert.export_weights(model, config))
    for layer in config.layers("E"):
        experts = model.decoder.layers[layer].mlp.experts
        for linear, name in (("linear_fc1", "up"), ("linear_fc2", "down")):
            experts.add_module(linear, Grouped(getattr(experts, name)))
            delattr(experts, name)
    grouped = dict(convert.export_weights(model, config))
    assert list(grouped) == list(stacked) and all(torch.equal(grouped[name], stacked[name]) for name in grouped)
    convert.import_weights(model, config, ((name, tensor + 1.0) for name, tensor in stacked.items()))
    table = dict(names.slots(model, config))
    for name, tensor in stacked.items():
        assert torch.equal(table[name].read(), tensor + 1.0), name


def test_te_is_refused_in_one_line_where_it_is_not_installed(config: NemotronHConfig) -> None:
    with pytest.raises(UserError) as caught:
        layer_spec("te", config)
    assert str(caught.value) == (
        "hardware.layer_spec: te needs the package transformer_engine (2.9 to 2.11), which is not installed; run in "
        "the GPU container or set layer_spec: local"
    )


@pytest.mark.parametrize("precision", ["hopper_fp8", "blackwell_mxfp8"])
def test_fp8_is_refused_in_one_line_where_transformer_engine_is_not_installed(
    config: NemotronHConfig, layout: ParallelLayout, tmp_path: Path, precision: str
) -> None:
    """However the model is built: megatron-core would train in bf16 and say nothing."""
    from nemo_cascade.models.cascade_model import CascadeModel, model_config

    line = (
        f"hardware.precision: {precision} needs the package transformer_engine (2.9 to 2.11), which is not installed; "
        "run in the GPU container, or set precision: bf16 and layer_spec: local"
    )
    with pytest.raises(UserError) as caught:
        nemotron_h.build(config, layout, precision, "te")
    assert str(caught.value) == line
    with pytest.raises(UserError) as caught:
        CascadeModel(model_config(config, layout, precision, "te"))
    assert str(caught.value) == line
    file = tmp_path / "policy.nemo"
    CascadeModel(model_config(config, layout)).save_to(str(file))
    with pytest.raises(UserError) as caught:
        CascadeModel.restore_from(
            str(file), override_config_path={"precision": precision, "layer_spec": "te"}
        )
    assert str(caught.value) == f"{file}: {line}"
