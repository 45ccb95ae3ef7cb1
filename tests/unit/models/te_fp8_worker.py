"""Run the te spec in FP8 on the stand-ins: `PYTHONPATH=te_standin:mamba_standin python te_fp8_worker.py PRECISION`.

What Transformer Engine was asked to multiply, and in which recipe, is compared with docs/precision.md and
conf/PAPER.md (fp8, fp8-widths). One process of its own for each precision: the scales are chosen at import.
"""

import sys

from nemo_cascade.models import convert, nemotron_h, parallel

import torch  # isort: skip
import transformer_engine as standin
from causal_conv1d import CALLS as CONVOLUTIONS
from mamba_ssm.ops.triton.ssd_combined import CALLS as SCANS

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
from nemo_cascade.models.routing import Routing

WIDE = NemotronHConfig(
    vocab_size=64, hidden_size=128, hybrid_override_pattern="M*EM*E*M", num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, mamba_num_heads=64, mamba_head_dim=4, ssm_state_size=16, n_groups=2, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=128, moe_shared_expert_intermediate_size=256, chunk_size=16,
)  # fmt: skip
"""Every weight's widths are multiples of 128: nothing is exempt, and every kind of layer is in the middle."""

RECIPES = {
    "hopper_fp8": standin.Float8BlockScaling(standin.Format.E4M3, standin.QParams(power_2_scale=False)),
    "blackwell_mxfp8": standin.MXFP8BlockScaling(standin.Format.E4M3),
}
TOKENS = {"hopper_fp8": (128, 16), "blackwell_mxfp8": (32, 32)}  # rows come in multiples of these, an expert's in these
LAYERS = {
    "M": ("mixer.in_proj", "mixer.out_proj"),
    "*": ("self_attention.linear_qkv", "self_attention.linear_proj"),
    "E": ("mlp.experts.linear_fc1", "mlp.experts.linear_fc2", "mlp.shared_experts.linear_fc1",
          "mlp.shared_experts.linear_fc2"),
}  # fmt: skip


def row(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(3, vocabulary, (90,), generator=torch.Generator().manual_seed(3)), torch.tensor([0, 30, 90])


def products(model: nemotron_h.NemotronH, precision: str) -> dict[str, bool]:
    """LAYER.NAME -> whether it multiplied in FP8, of one forward pass; recipe and numbers of tokens are checked."""
    names = {module: name.removeprefix("decoder.layers.") for name, module in model.named_modules()}
    outside = []  # FP8 is off where embedding, final norm and output layer run
    for module in (model.embedding, model.decoder.final_norm, model.output_layer):
        module.register_forward_pre_hook(lambda *_: outside.append(standin.FP8GlobalStateManager.is_fp8_enabled()))
    standin.PRODUCTS.clear()
    with torch.no_grad():
        model.packed_logits(*row(model.hf_config.vocab_size))
    assert outside == [False] * 3, outside
    found = {}
    for product in standin.PRODUCTS:
        name = names[product.layer]
        assert name not in found, name
        found[name] = product.recipe is not None
        assert product.recipe in (None, RECIPES[precision]), (name, product.recipe)
        whole, experts = TOKENS[precision]
        multiple = experts if "experts.linear" in name and "shared" not in name else whole
        assert product.recipe is None or not any(count % multiple for count in product.tokens), (name, product.tokens)
    return found


def check_layers(config: NemotronHConfig, precision: str, exempt: set[str], bf16_layers: int) -> nemotron_h.NemotronH:
    """Everything in the middle multiplies in FP8 but what is exempt; routers and parameters are as in bf16."""
    model = nemotron_h.build(config, parallel.ParallelLayout(), precision, "te", bf16_layers)
    pattern = config.hybrid_override_pattern
    middle = range(bf16_layers, len(pattern) - bf16_layers)
    expected = {
        f"{layer}.{name}": layer in middle and name not in exempt
        for layer, kind in enumerate(pattern)
        for name in LAYERS[kind]
    }
    for mode in (True, False):  # training and log-probabilities
        found = products(model.train(mode), precision)
        assert found == expected, {name for name in expected if found.get(name) != expected[name]} or found
    matrices = {value.dtype for name, value in model.named_parameters() if ".linear_" in name or "_proj" in name}
    assert matrices == {torch.bfloat16}  # no parameter is FP8
    assert {router.weight.dtype for router in routers(model)} == {torch.float32}
    return model


def compare_with_emulation(model: nemotron_h.NemotronH, precision: str) -> None:
    """The local spec rounds the same products in every layer: with its experts, it is nearer than bf16 is."""
    layout, (tokens, bounds) = parallel.ParallelLayout(), row(WIDE.vocab_size)
    weights = dict(convert.export_weights(model, WIDE))
    gaps = {}
    for name in ("bf16", f"{precision}_emulated"):
        local = nemotron_h.build(WIDE, layout, name, bf16_layers=0)
        convert.import_weights(local, WIDE, weights.items())
        free = Routing()
        with torch.no_grad():
            expected = local.packed_logits(tokens, bounds, routing=free).log_softmax(-1)
            found = model.packed_logits(tokens, bounds, routing=Routing(free.chosen())).log_softmax(-1)
        gaps[name] = float((found - expected).square().mean().sqrt())
    bf16, emulated = gaps.values()
    assert emulated < 0.75 * bf16, gaps  # not 0: where bf16 rounds otherwise, some values fall to the next FP8 number
    sys.stdout.write(f"{precision}: difference to the emulation {emulated:.2e}, to bf16 {bf16:.2e}\n")


def main(precision: str) -> None:
    """Raise where FP8 is anywhere else than it should be."""
    parallel.start(seed=3)
    model = check_layers(WIDE, precision, set(), 2)
    assert SCANS and CONVOLUTIONS  # the mixers ran on mamba-ssm's kernels
    compare_with_emulation(check_layers(WIDE, precision, set(), 0), precision)
    check_layers(NemotronHConfig.preset("nano"), precision, {"mixer.in_proj"}, 2)  # 648 rows
    tokens, bounds = row(WIDE.vocab_size)
    model.packed_logits(tokens, bounds).log_softmax(-1)[torch.arange(90), tokens].sum().backward()
    assert all(value.grad.isfinite().all() and value.grad.any() for value in model.parameters())
    parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1])
