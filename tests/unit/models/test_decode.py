"""Decoding, plain and compiled, equals a full recompute; that equals transformers; no row depends on its neighbours."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import DecodeModel, batches_by_length
from nemo_cascade.models.decode_native import AnyModel, NativeModel, decode_model, library
from nemo_cascade.types import UserError
from tests.unit.rollout.standins import random_weights, tiny_config


def prompts(lengths: list[int], vocab: int = 512, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG, scale=0.15)


@pytest.fixture(scope="module")
def oracle() -> DecodeModel:
    """Recomputes every position."""
    return DecodeModel(CONFIG, WEIGHTS)


@pytest.fixture(scope="module", params=["plain", "compiled"])
def model(request: pytest.FixtureRequest) -> AnyModel:
    if request.param == "plain":
        return DecodeModel(CONFIG, WEIGHTS)
    loaded = library()
    if loaded is None:
        pytest.skip("no C compiler here")
    return NativeModel(CONFIG, WEIGHTS, loaded)


def test_steps_equal_full_recompute(model: AnyModel, oracle: DecodeModel) -> None:
    texts = prompts([5, 1, 70, 33, 2, 32, 17])
    full = oracle.forward(texts)
    cut = [max(1, len(text) // 2) for text in texts]
    logits_BV, cache = model.prefill([text[:at] for text, at in zip(texts, cut, strict=True)])
    for row, at in enumerate(cut):
        torch.testing.assert_close(logits_BV[row], full[row][at - 1], atol=1e-5, rtol=1e-5)
    rows = [row for row, text in enumerate(texts) if len(text) > cut[row]]
    cache.keep(rows)
    steps = min(len(texts[row]) - cut[row] for row in rows)
    for step in range(steps):
        logits_BV = model.step(torch.tensor([texts[row][cut[row] + step] for row in rows]), cache)
        for place, row in enumerate(rows):
            torch.testing.assert_close(logits_BV[place], full[row][cut[row] + step], atol=1e-5, rtol=1e-5)


def by_token(experts: bytes) -> list[list[list[int]]]:
    """[tokens][MoE layers], the two experts of each in ascending order."""
    layers = len(CONFIG.layers("E"))
    table = torch.frombuffer(bytearray(experts), dtype=torch.uint8).view(-1, layers, CONFIG.num_experts_per_tok)
    return table.sort(-1).values.tolist()


def test_experts_are_noted_as_chosen_and_noting_changes_nothing(model: AnyModel, oracle: DecodeModel) -> None:
    texts = prompts([5, 70, 33, 34, 1], seed=8)
    whole: list[bytes] = []
    oracle.prefill(texts, experts=whole)
    read = [3, 40, 20, 33, 1]
    heads = [text[:at] for text, at in zip(texts, read, strict=True)]
    noted: list[bytes] = []
    (logits_BV, cache), (plain_BV, plain_cache) = model.prefill(heads, experts=noted), model.prefill(heads)
    assert torch.equal(logits_BV, plain_BV)
    for row in range(5):
        assert by_token(noted[row]) == by_token(whole[row])[: read[row]]
    assert len({expert for row in whole for token in by_token(row) for layer in token for expert in layer}) == 6
    for cached in (cache, plain_cache):
        assert cached.drop([0, 4]) == [3, 1, 2]
    fed = torch.tensor([texts[row][read[row]] for row in (3, 1, 2)])
    stepped: list[bytes] = []
    assert torch.equal(model.step(fed, cache, stepped), model.step(fed, plain_cache))
    for row, own in zip((3, 1, 2), stepped, strict=True):
        assert by_token(own) == [by_token(whole[row])[read[row]]]


def test_long_decode_grows_the_attention_cache(model: AnyModel, oracle: DecodeModel) -> None:
    text = prompts([90])[0]
    full = oracle.forward([text])[0]
    _, cache = model.prefill([text[:3]])
    for at in range(3, 90):
        logits_BV = model.step(torch.tensor([text[at]]), cache)
        torch.testing.assert_close(logits_BV[0], full[at], atol=1e-5, rtol=1e-5)
    assert cache.lengths == [90]


def test_rows_do_not_depend_on_batch_mates(model: AnyModel) -> None:
    """Bit for bit: what makes a request's tokens the same alone and in any batch."""
    texts = prompts([3, 60, 33, 8, 31, 64, 12, 1, 40], seed=1)
    fed = prompts([40] * 9, seed=2)

    def run(rows: list[int]) -> torch.Tensor:
        logits_BV, cache = model.prefill([texts[row] for row in rows], room=4)
        steps = [logits_BV]
        steps += [model.step(torch.tensor([fed[row][at] for row in rows]), cache) for at in range(40)]
        return torch.stack(steps, 1)

    together = run(list(range(9)))
    for rows in ([0], [8], [7, 1], [6, 5, 4, 3, 2]):
        assert torch.equal(run(rows), together[rows])


def test_drop_and_join_keep_each_row_its_own(model: AnyModel, oracle: DecodeModel) -> None:
    texts = prompts([4, 50, 9, 20, 33], seed=3)
    late = prompts([60], seed=4)[0]
    _, cache = model.prefill(texts)
    order = cache.drop([0, 3])
    assert order == [4, 1, 2]
    _, joined = model.prefill([late])
    cache = cache.join([cache, joined])  # type: ignore[list-item]
    assert cache.lengths == [33, 50, 9, 60]
    token = 7
    logits_BV = model.step(torch.tensor([token] * 4), cache)
    whole = oracle.forward([[*text, token] for text in (texts[4], texts[1], texts[2], late)])
    for row, expected_TV in enumerate(whole):
        torch.testing.assert_close(logits_BV[row], expected_TV[-1], atol=1e-5, rtol=1e-5)


def test_equals_transformers() -> None:
    """The independent oracle, at a different width, with weights where every term counts."""
    transformers = pytest.importorskip("transformers")
    config = tiny_config(hybrid_override_pattern="ME*M", num_experts_per_tok=3, n_groups=3, routed_scaling_factor=1.7)
    named = random_weights(config, seed=5, scale=0.15)
    reference = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**config.to_hf_json())).eval()
    missing, unexpected = reference.load_state_dict(_packed(config, named), strict=False)
    assert not missing and not unexpected
    texts = prompts([23, 1, 40], seed=6)
    for text, logits_TV in zip(texts, DecodeModel(config, named).forward(texts), strict=True):
        with torch.no_grad():
            expected_TV = reference(torch.tensor([text])).logits[0]
        torch.testing.assert_close(logits_TV, expected_TV, atol=2e-5, rtol=1e-5)


def _packed(config: NemotronHConfig, named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Published names as transformers holds them in memory: `model.` and experts in one tensor."""
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        name = name.replace("backbone.", "model.")
        if ".experts." in name:
            if ".experts.0." in name:
                parts = [
                    named[name.replace("model.", "backbone.").replace(".experts.0.", f".experts.{k}.")]
                    for k in range(config.n_routed_experts)
                ]
                packed[name.replace(".experts.0.", ".experts.").removesuffix(".weight")] = torch.stack(parts)
            continue
        packed[name] = tensor
    return packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named: named.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda named: named.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda named: named.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head.weight has shape"),
    ],
)
def test_bad_weights_are_named(change, message: str) -> None:
    config = tiny_config()
    named = random_weights(config)
    change(named)
    with pytest.raises(UserError, match=message):
        DecodeModel(config, named)


def test_prompts_are_read_by_padded_length() -> None:
    assert batches_by_length([1, 33, 32, 64, 65]) == [[0, 2], [1, 3], [4]]
    many = batches_by_length([10_000] * 3)
    assert many == [[0], [1], [2]]


@pytest.mark.parametrize(
    "changes",
    [
        {
            "hybrid_override_pattern": "*ME",
            "vocab_size": 77,
            "num_experts_per_tok": 3,
            "n_groups": 3,
            "hidden_size": 100,
        },
        {"hybrid_override_pattern": "EM", "conv_kernel": 2, "n_routed_experts": 40, "moe_intermediate_size": 200},
    ],
)
def test_compiled_step_equals_plain_at_odd_widths(changes: dict[str, int | str]) -> None:
    loaded = library()
    if loaded is None:
        pytest.skip("no C compiler here")
    config = tiny_config(**changes)
    named = random_weights(config, seed=2, scale=0.1)
    plain, compiled = DecodeModel(config, named), NativeModel(config, named, loaded)
    texts = prompts([7, 40, 1], vocab=config.vocab_size)
    (expected_BV, expected_cache), (found_BV, cache) = plain.prefill(texts), compiled.prefill(texts)
    torch.testing.assert_close(found_BV, expected_BV, atol=1e-5, rtol=1e-5)
    for token in range(5):
        tokens_B = torch.tensor([token, token + 1, token + 2])
        expected_BV, found_BV = plain.step(tokens_B, expected_cache), compiled.step(tokens_B, cache)
        torch.testing.assert_close(found_BV, expected_BV, atol=1e-5, rtol=1e-5)


def test_without_a_compiler_plain_pytorch_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, value in (("NEMO_CASCADE_NATIVE", "0"), ("CC", "/bin/false")):
        library.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            patch.setenv(variable, value)
            assert isinstance(decode_model(CONFIG, WEIGHTS), DecodeModel)
    library.cache_clear()
