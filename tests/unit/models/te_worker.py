"""Build and run the te spec on the stand-in of Transformer Engine: `PYTHONPATH=te_standin python te_worker.py`.

One process of its own, because megatron-core asks once, at import, whether Transformer Engine is there.
"""

from nemo_cascade.models import convert, nemotron_h, parallel

import torch  # isort: skip

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.dtypes import kind_of, learner_dtype
from nemo_cascade.models.mamba import Mamba2Mixer
from nemo_cascade.models.moe import routers
from nemo_cascade.models.routing import Routing


def main() -> None:
    """Raise where the two specs disagree."""
    from megatron.core.extensions import transformer_engine as te

    layout, config = parallel.start(seed=3), NemotronHConfig.preset("nano")
    local, other = (nemotron_h.build(config, layout, "bf16", spec) for spec in ("local", "te"))
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for router in routers(local):
            router.expert_bias.copy_(0.2 * torch.randn_like(router.expert_bias))
    convert.import_weights(other, config, convert.export_weights(local, config))
    exported = dict(convert.export_weights(local, config))
    for name, tensor in convert.export_weights(other, config):
        assert torch.equal(tensor, exported[name].to(tensor.dtype)), name
        for spec, stored in (("local", exported[name]), ("te", tensor)):
            assert convert.dtype_name(stored) == learner_dtype(kind_of(name), "bf16", spec), (name, spec)

    counts = {kind.__name__: sum(isinstance(module, kind) for module in other.modules()) for kind in
              (te.TEColumnParallelLinear, te.TERowParallelLinear, te.TEGroupedLinear, te.TEDotProductAttention,
               te.te.pytorch.RMSNorm, Mamba2Mixer)}  # fmt: skip
    assert list(counts.values()) == [6, 6, 0, 2, 7, 2], counts
    names = [{name for name, _ in model.named_parameters()} for model in (local, other)]
    assert names[0] == names[1], names[0] ^ names[1]
    fp32 = {name.split(".", 3)[-1] for name, value in other.named_parameters() if value.dtype == torch.float32}
    assert fp32 == {"mixer.A_log", "mixer.D", "mixer.dt_bias", "mlp.router.weight"}, fp32

    tokens = torch.randint(0, 512, (90,), generator=torch.Generator().manual_seed(3))
    bounds = torch.tensor([0, 30, 77, 90]).int()
    free = Routing()
    expected = local.packed_logits(tokens, bounds, routing=free)
    logits = other.packed_logits(tokens, bounds, routing=Routing(free.chosen()))
    gap = (logits.log_softmax(-1) - expected.log_softmax(-1)).abs()
    spread = expected.log_softmax(-1).std()
    assert gap.mean() < 0.02 * spread, (gap.mean(), gap.max(), spread)
    grads = []
    for model, values in ((local, expected), (other, logits)):
        torch.nn.functional.cross_entropy(values, tokens).backward()
        grads.append({name: parameter.grad.float() for name, parameter in model.named_parameters()})
    for name in names[0]:
        first, second = (grad[name].flatten() for grad in grads)
        assert torch.nn.functional.cosine_similarity(first, second, dim=0) > 0.98, name
    print(f"{len(names[0])} parameters with one name, one value and one gradient in both specs")  # noqa: T201
    parallel.stop()


if __name__ == "__main__":
    main()
