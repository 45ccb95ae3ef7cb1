"""What every Sampler promises: the local one, and the remote one on a server that really runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_cascade.models.decode import DecodeModel
from nemo_cascade.refit.checksum import checksum_of
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.rollout.remote import RemoteSampler
from nemo_cascade.rollout.server import ServerHandle, start_server
from nemo_cascade.types import NO_CHOICE, Request, SamplingParams, UserError
from tests.unit.rollout.standins import random_weights, tiny_config, write_folder

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG, scale=0.15)
PROMPTS = [tuple(range(3 + index, 3 + index + length)) for index, length in enumerate((1, 5, 33, 60))]
AnySampler = LocalSampler | RemoteSampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), CONFIG, WEIGHTS)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerHandle]:
    with start_server(folder, deadline_s=120.0) as handle:
        yield handle


@pytest.fixture(params=["local", "remote"])
def sampler(request: pytest.FixtureRequest, folder: Path) -> Iterator[AnySampler]:
    if request.param == "local":
        made: AnySampler = LocalSampler.from_folder(folder)
    else:
        made = RemoteSampler(request.getfixturevalue("server").url, deadline_s=60.0, per_call=3)
        made.load_folder(folder, 0)
    yield made
    made.close()


def requests(count: int, max_new_tokens: int = 12, seed: int = 0) -> list[Request]:
    return [Request(PROMPTS[index % 4], seed + index, max_new_tokens) for index in range(count)]


def test_same_requests_give_same_completions_in_any_company(sampler: AnySampler) -> None:
    params = SamplingParams(12, temperature=1.0)
    asked = requests(8)
    together = dict(sampler.sample(asked, params))
    assert sorted(together) == list(range(8))
    again = dict(sampler.sample(asked, params))
    assert again == together
    for index in (0, 5):
        assert dict(sampler.sample([asked[index]], params))[0] == together[index]
    backwards = dict(sampler.sample(asked[::-1], params))
    assert [backwards[7 - index] for index in range(8)] == [together[index] for index in range(8)]
    others = dict(sampler.sample(requests(8, seed=100), params))
    assert all(others[index].token_ids != together[index].token_ids for index in range(8))


def test_logprobs_are_those_of_the_distribution_that_sampled(sampler: AnySampler) -> None:
    model = DecodeModel(CONFIG, WEIGHTS)
    params = SamplingParams(10, temperature=0.7, top_p=0.8, top_k=40)
    asked = requests(4)
    for index, completion in sampler.sample(asked, params):
        prompt = asked[index].token_ids
        logits_TV = model.forward([(*prompt, *completion.token_ids)])[0][len(prompt) - 1 : -1] / 0.7
        for logits_V, token, logprob in zip(logits_TV, completion.token_ids, completion.logprobs, strict=True):
            order = sorted(range(512), key=lambda place: (-float(logits_V[place]), place))[:40]
            probabilities = torch.softmax(logits_V[order], -1).tolist()
            kept, mass = 0, 0.0
            while mass < 0.8:
                mass += probabilities[kept]
                kept += 1
            assert token in order[:kept]
            expected = torch.log(torch.tensor(probabilities[order.index(token)] / mass)).item()
            assert logprob == pytest.approx(expected, abs=1e-4)


def test_raw_logprobs_are_the_models_own_and_change_no_draw(sampler: AnySampler) -> None:
    model, asked = DecodeModel(CONFIG, WEIGHTS), requests(4)
    kept = dict(sampler.sample(asked, SamplingParams(10, temperature=0.7, top_p=0.8)))
    raw = dict(sampler.sample(asked, SamplingParams(10, temperature=0.7, top_p=0.8, logprobs="raw")))
    for index, completion in raw.items():
        assert completion.token_ids == kept[index].token_ids
        prompt = asked[index].token_ids
        logits_TV = model.forward([(*prompt, *completion.token_ids)])[0][len(prompt) - 1 : -1]
        own_T = torch.log_softmax(logits_TV, -1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert list(completion.logprobs) == pytest.approx(own_T.tolist(), abs=1e-4)
        assert sum(kept[index].logprobs) > sum(completion.logprobs) + 0.5  # the kept set has less to choose from


def test_experts_are_those_that_the_tokens_used(sampler: AnySampler) -> None:
    """Of prompt and answer, whatever shares the batch; nothing else changes, and who does not ask gets none."""
    model, asked = DecodeModel(CONFIG, WEIGHTS), requests(8)
    plain = dict(sampler.sample(asked, SamplingParams(12)))
    assert {completion.routed_experts for completion in plain.values()} == {b""}
    found = dict(sampler.sample(asked, SamplingParams(12, routed_experts=True)))
    assert sorted(found) == list(range(8))
    for index, completion in found.items():
        assert (completion.token_ids, completion.logprobs) == (plain[index].token_ids, plain[index].logprobs)
        text = (*asked[index].token_ids, *completion.token_ids)
        recomputed: list[bytes] = []
        model.prefill([text], experts=recomputed)
        used, expected = (
            torch.frombuffer(bytearray(experts), dtype=torch.uint8).view(len(text), 2, 2).sort(-1).values
            for experts in (completion.routed_experts, recomputed[0])
        )
        assert torch.equal(used[:-1], expected[:-1]) and (used[-1] == NO_CHOICE).all()


def test_draws_follow_the_distribution(sampler: AnySampler) -> None:
    """First tokens of 4,000 seeds against the model's probabilities: chi-square over the likeliest tokens."""
    probabilities_V = torch.softmax(DecodeModel(CONFIG, WEIGHTS).forward([PROMPTS[1]])[0][-1], -1)
    drawn = [
        completion.token_ids[0]
        for _, completion in sampler.sample([Request(PROMPTS[1], seed, 1) for seed in range(4000)], SamplingParams(1))
    ]
    tokens = [token for token in range(512) if probabilities_V[token] > 0.004]
    counts = torch.tensor([drawn.count(token) for token in tokens] + [sum(token not in tokens for token in drawn)])
    expected = torch.cat([probabilities_V[tokens], 1 - probabilities_V[tokens].sum(0, keepdim=True)]) * 4000
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    degrees = len(tokens)
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_greedy_takes_the_likeliest_token(sampler: AnySampler) -> None:
    model = DecodeModel(CONFIG, WEIGHTS)
    asked = [Request(prompt, seed, 6) for seed, prompt in enumerate(PROMPTS)]
    for index, completion in sampler.sample(asked, SamplingParams(6, temperature=0.0)):
        prompt = PROMPTS[index]
        logits_TV = model.forward([(*prompt, *completion.token_ids)])[0][len(prompt) - 1 : -1]
        assert list(completion.token_ids) == logits_TV.argmax(-1).tolist()
        chosen_T = torch.log_softmax(logits_TV, -1).amax(-1)
        assert list(completion.logprobs) == pytest.approx(chosen_T.tolist(), abs=1e-4)


def test_stop_ids_and_limits(sampler: AnySampler) -> None:
    stops = tuple(range(0, 512, 3))
    found = dict(sampler.sample(requests(16, 9), SamplingParams(7, stop_ids=stops)))
    assert {completion.finish for completion in found.values()} == {"stop", "length"}
    for completion in found.values():
        ended = completion.token_ids[-1] in stops
        assert completion.finish == ("stop" if ended else "length")
        assert not set(completion.token_ids[:-1]) & set(stops)
        assert len(completion.token_ids) == len(completion.logprobs) <= 7
        assert ended or len(completion.token_ids) == 7
    short = dict(sampler.sample([Request(PROMPTS[0], 1, 2), Request(PROMPTS[0], 1, 5)], SamplingParams(7)))
    assert [len(short[index].token_ids) for index in (0, 1)] == [2, 5]
    assert short[1].token_ids[:2] == short[0].token_ids


def test_load_weights_changes_version_checksum_and_answers(sampler: AnySampler) -> None:
    asked, params = requests(4), SamplingParams(8, temperature=0.0)
    before = dict(sampler.sample(asked, params))
    assert {completion.version for completion in before.values()} == {0}
    other = random_weights(CONFIG, seed=9, scale=0.15)
    sampler.load_weights(iter(other.items()), 7)
    assert sampler.version == 7
    assert sampler.checksum == checksum_of(other.items())
    after = dict(sampler.sample(asked, params))
    assert {completion.version for completion in after.values()} == {7}
    assert all(after[index].token_ids != before[index].token_ids for index in range(4))


def test_bad_weights_change_nothing(sampler: AnySampler) -> None:
    asked, params = requests(3), SamplingParams(8, temperature=0.0)
    before, checksum = dict(sampler.sample(asked, params)), sampler.checksum
    incomplete = {name: tensor + 1 for name, tensor in WEIGHTS.items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        sampler.load_weights(iter(incomplete.items()), 8)
    with pytest.raises(UserError, match=r"lm_head.weight has shape"):
        sampler.load_weights(iter({**WEIGHTS, "lm_head.weight": torch.zeros(2, 2)}.items()), 8)
    assert (sampler.version, sampler.checksum) == (0, checksum)
    assert dict(sampler.sample(asked, params)) == before


def test_folders_are_taken_whole_or_not_at_all(sampler: AnySampler, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        sampler.load_folder(tmp_path / "nowhere", 3)
    save_file({"backbone.norm_f.weight": torch.ones(48)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="59 tensors are missing, the first is backbone.embeddings.weight"):
        sampler.load_folder(tmp_path, 3)
    assert sampler.version == 0


@pytest.mark.parametrize(
    ("request_", "params", "message"),
    [
        (Request((), 0, 4), SamplingParams(4), "the prompt is empty"),
        (Request((1, 512), 0, 4), SamplingParams(4), "token ids must lie in 0..511"),
        (Request((1,), 0, 0), SamplingParams(4), "max_new_tokens 0 is below 1"),
        (Request((1,), 0, 4), SamplingParams(4, top_p=0.0), r"sampling.top_p: 0.0 is outside \(0, 1\]"),
        (Request((1,), 0, 4), SamplingParams(4, temperature=-1.0), "sampling.temperature: -1.0 is below 0"),
        (Request((1,), 0, 4), SamplingParams(4, top_k=-1), "sampling.top_k: -1 is below 0"),
    ],
)
def test_mistakes_are_named(sampler: AnySampler, request_: Request, params: SamplingParams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(sampler.sample([request_], params))
