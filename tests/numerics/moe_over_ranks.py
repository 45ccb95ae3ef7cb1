"""One rank of the comparison of dispatchers, routing replay and `.nemo` files over two ranks with one rank.

Run as a script with RANK and WORLD_SIZE set: moe_over_ranks.py FOLDER. Both ranks run the same rows, so an expert's
gradient is twice that of one rank, and every other gradient the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_cascade.models import parallel

import torch  # isort: skip
from omegaconf import OmegaConf

from nemo_cascade.models import convert, nemotron_h
from nemo_cascade.models.cascade_model import CascadeModel
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.moe import routers
from nemo_cascade.models.parallel import ParallelLayout
from nemo_cascade.models.routing import Routing

CASES = {
    "ep2_allgather": {"expert": 2, "dispatcher": "allgather"},
    "ep2_alltoall": {"expert": 2, "dispatcher": "alltoall"},
    "tp2_allgather": {"tensor": 2, "dispatcher": "allgather"},
    "tp2_alltoall": {"tensor": 2, "dispatcher": "alltoall"},
    "tp2_local": {"tensor": 2, "dispatcher": "local"},
    "tp2_ep2_alltoall": {"tensor": 2, "expert": 2, "dispatcher": "alltoall"},
}


def check(name: str, folder: Path, layout: ParallelLayout, expected: dict[str, torch.Tensor]) -> None:
    """Logits, choices, replayed logits and, where ranks hold whole layers, gradients."""
    config = NemotronHConfig.preset("nano")
    model = nemotron_h.build(config, layout)
    convert.load_folder(model, folder / "hf")
    tokens, bounds = expected["tokens"], expected["bounds"]
    free = Routing()
    logits = model.packed_logits(tokens, bounds, routing=free)
    close(logits, expected["logits"], f"{name}: logits")
    assert torch.equal(free.chosen(), expected["chosen"]), f"{name}: choices"
    replay = Routing(expected["other"])
    with torch.no_grad():
        close(model.packed_logits(tokens, bounds, routing=replay), expected["replayed"], f"{name}: replayed logits")
    differs = replay.difference()
    assert torch.equal(differs, expected["difference"]), f"{name}: {differs.tolist()} differ"
    if layout.tensor > 1:
        return
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    layer = model.decoder.layers[2].mlp
    own = slice(4 * torch.distributed.get_rank(), 4 * torch.distributed.get_rank() + 4)
    close(layer.experts.up.grad, 2.0 * expected["up"][own], f"{name}: gradient of the experts")
    close(routers(model)[0].weight.grad, expected["gate"], f"{name}: gradient of the router")


def close(own: torch.Tensor, other: torch.Tensor, what: str) -> None:
    gap = float((own - other).abs().max())
    assert gap < 1e-5 * max(1.0, float(other.abs().max())), f"{what}: {gap}"


def main(folder: Path) -> None:
    expected = torch.load(folder / "expected.pt")
    for name, fields in CASES.items():
        layout = ParallelLayout(**fields)
        parallel.start(layout, rendezvous=folder / f"{name}.rendezvous")
        check(name, folder, layout, expected)
        if name.startswith("tp2"):  # a file written by one rank, restored by two under another layout
            override = OmegaConf.create({"layout": fields})
            policy = CascadeModel.restore_from(str(folder / "policy.nemo"), override_config_path=override)
            with torch.no_grad():
                close(policy(expected["tokens"], expected["bounds"]), expected["logits"], f"{name}: .nemo")
            policy.save_to(str(folder / f"{name}.nemo"))
        parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
