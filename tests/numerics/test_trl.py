"""Our policy-gradient loss against TRL's own trainer, on the same log-probabilities and through the model.

TRL is no requirement of ours: `make bench` installs it, and then these run.
"""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="trl is not installed; `make bench` installs it")

from tools.bench.trl_agreement import FORMULAS, Formula, on_same_logprobs, through_the_model


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda formula: formula.name)
def test_loss_and_gradient_by_logprob_agree_on_the_same_logprobs(formula: Formula, layout) -> None:
    found = on_same_logprobs(formula)
    assert found.gradient < 1e-5
    assert (found.loss is not None) == formula.values
    if found.loss is not None:
        assert found.loss < 1e-5


def test_values_are_compared_with_and_without_kl_and_off_policy() -> None:
    compared = [formula for formula in FORMULAS if formula.values]
    assert {formula.ours.kl > 0.0 for formula in compared} == {True, False}
    assert {formula.off_policy for formula in compared} == {True, False}


def test_loss_and_gradient_of_every_weight_agree_through_the_model(layout) -> None:
    found = through_the_model()
    assert found.loss is not None and found.loss < 1e-4
    assert found.gradient < 1e-4
