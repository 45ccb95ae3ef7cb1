"""A training checkpoint at nano size, saved in one layout and gone on with in another: weights and moments bit for bit.

Layouts of two and four ranks run in processes of their own.
"""

from pathlib import Path

import pytest

from nemo_cascade.learner.megatron import MegatronLearner

import torch  # isort: skip

from tests import ranks
from tests.numerics import checkpoint_worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ranks")]
IN_TWO = ("data", "tensor", "expert", "stages", "zero", "context")
IN_FOUR = ("tensor-expert", "tensor-context")
CUT = (*IN_TWO, *IN_FOUR)
ACROSS = (("tensor", "expert"), ("stages", "zero"), ("zero", "tensor"), ("context", "stages"))
ACROSS_FOUR = (("tensor", "tensor-expert"), ("zero", "tensor-context"))
ASYNC = ("tensor", "zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `one` and of each cut layout; each cut layout loads `one`, one rank and another cut load theirs."""
    base = tmp_path_factory.mktemp("checkpoints")
    MegatronLearner(checkpoint_worker.NANO, checkpoint_worker.SETTINGS, seed=3).export(str(base / "start"))
    checkpoint_worker.run(base, "one", "save", "one")
    for count, layouts, across in ((2, IN_TWO, ACROSS), (4, IN_FOUR, ACROSS_FOUR)):
        loads = [f"{layout}:load:one" for layout in layouts] + [f"{layout}:load:{name}" for name, layout in across]
        saves = [f"{layout}:save:{layout}" for layout in layouts]
        ranks.run(checkpoint_worker.__file__, str(base), *saves, *loads, ranks=count, deadline_s=1200.0)
    in_background = [f"{layout}:save-async:async-{layout}" for layout in ASYNC]
    ranks.run(checkpoint_worker.__file__, str(base), *in_background)
    for name in (*CUT, *(f"async-{layout}" for layout in ASYNC)):
        checkpoint_worker.run(base, "one", "load", name)
    return base


def compare(folder: Path, name: str, saved_in: str, loaded_in: str) -> None:
    saved = torch.load(folder / f"{name}-{saved_in}.pt", weights_only=True)
    loaded = torch.load(folder / f"{name}-{loaded_in}.pt", weights_only=True)
    assert loaded["steps"] == saved["steps"] == 2
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        assert loaded[kind].keys() == saved[kind].keys()
        differing = [key for key in saved[kind] if not torch.equal(loaded[kind][key], saved[kind][key])]
        assert not differing, f"{kind}: {differing[:3]}"
    assert loaded["losses"][0] == pytest.approx(saved["losses"][0], abs=1e-6)
    # The moments have moved the second, and so has the rounding of gradients, which Adam divides by their size.
    assert loaded["losses"][1] == pytest.approx(saved["losses"][1], abs=1e-5)
    assert abs(saved["losses"][0] - saved["losses"][1]) > 1e-2


@pytest.mark.parametrize("layout", CUT)
def test_saved_on_one_rank_loaded_on_several(folder, layout):
    compare(folder, "one", "one", layout)


@pytest.mark.parametrize("layout", CUT)
def test_saved_on_several_ranks_loaded_on_one(folder, layout):
    compare(folder, layout, layout, "one")


@pytest.mark.parametrize("layout", ASYNC)
def test_saved_while_training_goes_on(folder, layout):
    compare(folder, f"async-{layout}", layout, "one")
    compare(folder, layout, layout, "one")
    both = [torch.load(folder / f"{name}-one.pt", weights_only=True) for name in (layout, f"async-{layout}")]
    assert all(torch.equal(value, both[1]["exp_avg"][name]) for name, value in both[0]["exp_avg"].items())


@pytest.mark.parametrize(("name", "layout"), ACROSS + ACROSS_FOUR)
def test_saved_in_one_cut_loaded_in_another(folder, name, layout):
    compare(folder, name, name, layout)


def test_every_moment_is_somewhere_not_zero(folder):
    found = torch.load(folder / "one-one.pt", weights_only=True)
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(value.any() for name, value in found[kind].items() if "bias" not in name), kind
