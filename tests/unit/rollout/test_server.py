"""The server as its users meet it: OpenAI clients, judges, and people who start it on a taken port."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from nemo_cascade.reward.judge import Judge
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.rollout.remote import RemoteSampler
from nemo_cascade.rollout.server import LoopbackServer, Server, ServerHandle, start_server
from nemo_cascade.rollout.trtllm import TrtLlmSampler
from nemo_cascade.types import Json, Message, Request, SamplingParams, UserError
from tests.unit.rollout.standins import nano_chat, random_weights, tiny_config, write_folder

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG, scale=0.15)
CHAT = nano_chat()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"), CONFIG, WEIGHTS)


@contextmanager
def listening(served: Server) -> Iterator[str]:
    """The server on a thread of this process: the same code without the start-up time."""
    server = LoopbackServer(0, served)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server.url
    server.shutdown()
    server.server_close()
    served.decoding.close()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with listening(Server(LocalSampler.from_folder(folder), CHAT, "tiny", thinking=False)) as address:
        yield address


def post(url: str, path: str, **body: object) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60.0)


def expected(messages: list[Message], thinking: bool, seed: int, count: int, temperature: float) -> tuple[int, ...]:
    """What the model says when it is asked directly."""
    sampler = LocalSampler(CONFIG)
    sampler.load_weights(iter(WEIGHTS.items()), 0)
    prompt = tuple(CHAT.messages_ids(messages, (), thinking))
    params = SamplingParams(count, temperature=temperature, stop_ids=CHAT.stop_ids)
    return dict(sampler.sample([Request(prompt, seed, count)], params))[0].token_ids


def test_health_and_models(url: str) -> None:
    health = httpx.get(url + "/health").json()
    assert (health["status"], health["version"], health["vocab_size"]) == ("ok", 0, 512)
    assert [model["id"] for model in httpx.get(url + "/v1/models").json()["data"]] == ["tiny"]
    assert httpx.get(url + "/nothing").status_code == 404


def test_chat_renders_our_template_with_the_roles_of_the_reward_model(url: str) -> None:
    rows = [
        {"role": "user", "content": "which is better?"},
        {"role": "response_1", "content": "red"},
        {"role": "response_2", "content": "blue"},
    ]
    answer = post(url, "/v1/chat/completions", messages=rows, max_tokens=9, seed=4, logprobs=True).json()
    messages = [Message(row["role"], row["content"]) for row in rows]  # type: ignore[arg-type]
    ids = expected(messages, False, 4, 9, 1.0)
    choice = answer["choices"][0]
    assert choice["message"]["content"] == CHAT.parse_assistant(ids, False).content
    assert [row["token_id"] for row in choice["logprobs"]["content"]] == list(ids)
    assert answer["usage"]["prompt_tokens"] == len(CHAT.messages_ids(messages, (), False))
    thinking = post(
        url, "/v1/chat/completions", messages=rows, max_tokens=9, seed=4, chat_template_kwargs={"enable_thinking": True}
    ).json()
    want = expected(messages, True, 4, 9, 1.0)
    assert [row["token_id"] for row in thinking["choices"][0]["logprobs"]["content"]] == list(want)


def test_samples_of_one_prompt_use_seed_plus_index(url: str) -> None:
    rows = [{"role": "user", "content": "hello"}]
    found = post(url, "/v1/chat/completions", messages=rows, max_tokens=6, seed=10, n=3).json()["choices"]
    for index, choice in enumerate(found):
        ids = expected([Message("user", "hello")], False, 10 + index, 6, 1.0)
        assert [row["token_id"] for row in choice["logprobs"]["content"]] == list(ids)


def test_text_and_token_prompts_are_the_same_prompt(url: str) -> None:
    ids = CHAT.encode_text("one two")
    text = post(url, "/v1/completions", prompt="one two", max_tokens=5, seed=1, temperature=0).json()["choices"]
    tokens = post(url, "/v1/completions", prompt=ids, max_tokens=5, seed=1, temperature=0).json()["choices"]
    both = post(url, "/v1/completions", prompt=["one two", ids], max_tokens=[5, 2], seed=[1, 2], temperature=0).json()
    assert text == tokens
    assert [choice["token_ids"] for choice in both["choices"]] == [text[0]["token_ids"], text[0]["token_ids"][:2]]
    assert text[0]["text"] == CHAT.decode(text[0]["token_ids"])


def test_concurrent_greedy_answers_equal_lonely_ones(url: str) -> None:
    prompts = [f"question {index} about {index * index}" for index in range(12)]

    def ask(prompt: str) -> list[int]:
        body = post(url, "/v1/completions", prompt=prompt, max_tokens=12, temperature=0)
        return body.json()["choices"][0]["token_ids"]

    alone = [ask(prompt) for prompt in prompts]
    found: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda place=index: found.update({place: ask(prompts[place])})) for index in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(12)] == alone


def test_our_judge_client_gets_an_answer_that_ends_and_nothing_of_one_cut_off(url: str) -> None:
    sampler, asked = LocalSampler(CONFIG), [f"hello {index}" for index in range(400)]
    sampler.load_weights(iter(WEIGHTS.items()), 0)
    requests = [Request(tuple(CHAT.messages_ids([Message("user", text)], (), False)), 0, 24) for text in asked]
    answers = dict(sampler.sample(requests, SamplingParams(24, temperature=0.0, stop_ids=CHAT.stop_ids)))
    ended = {text: answers[index].token_ids for index, text in enumerate(asked)}
    text = next(text for text, ids in ended.items() if ids[-1] in CHAT.stop_ids and len(ids) > 2)
    with Judge(url + "/v1", "tiny", timeout_s=30.0) as judge:
        whole = judge.ask([{"role": "user", "content": text}], 24)
        assert whole == CHAT.parse_assistant(ended[text], False).content.strip()
        assert judge.ask([{"role": "user", "content": text}], len(ended[text]) - 1) == ""


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {}, "prompt: a text, a list of token ids"),
        ("/v1/completions", {"prompt": "a", "stream": True}, "stream: not supported"),
        ("/v1/completions", {"prompt": [[1], [2]], "seed": [1]}, "seed: .* a list of 2, one per prompt"),
        ("/v1/completions", {"prompt": "a", "temperature": "hot"}, "temperature: 'hot' is not a number"),
        ("/v1/completions", {"prompt": [[900]]}, "token ids must lie in 0..511"),
        ("/v1/chat/completions", {"messages": [], "return_routed_experts": True}, "only /v1/completions reports"),
        ("/v1/chat/completions", {"messages": [{"role": "robot"}]}, r"messages\[0\].role: one of system, user"),
        ("/weights", {"folder": 3}, "weights: `folder`"),
    ],
)
def test_mistakes_of_the_asker_are_400_with_one_line(
    url: str, path: str, body: dict[str, object], message: str
) -> None:
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 400
    with pytest.raises(UserError, match=message):
        raise UserError(answer.json()["error"]["message"])


def test_a_taken_port_is_named_with_the_remedy(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: the port is in use on 127.0.0.1; choose another"):
            start_server(folder, port=port)


def test_a_folder_without_a_model_ends_with_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"server for .*: ended: .*config.json is missing"):
        start_server(tmp_path)


def test_a_server_that_does_not_come_up_in_time_is_ended(folder: Path) -> None:
    with pytest.raises(UserError, match=r"did not come up within 0 s"):
        start_server(folder, deadline_s=0.01)


def test_the_server_ends_with_its_handle(folder: Path) -> None:
    handle: ServerHandle = start_server(folder)
    assert httpx.get(handle.url + "/health").json()["status"] == "ok"
    handle.close()
    assert isinstance(handle.process, subprocess.Popen) and handle.process.returncode == 0
    with pytest.raises(UserError, match="gave no answer within 1 s"):
        RemoteSampler(handle.url, deadline_s=1.0)


def test_answers_of_other_weights_are_refused(url: str) -> None:
    first, second = RemoteSampler(url, deadline_s=30.0), RemoteSampler(url, deadline_s=30.0)
    first.load_weights(iter(WEIGHTS.items()), 4)
    with pytest.raises(UserError, match="answered with weights of version 4, 0 were loaded"):
        list(second.sample([Request((1,), 0, 2)], SamplingParams(2)))
    first.load_weights(iter(WEIGHTS.items()), 0)
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("says", "message"), [(False, "its /health does not say that it can"), (True, "0 bytes for 3 tokens")]
)
def test_a_server_that_cannot_report_experts_is_refused(folder: Path, says: bool, message: str) -> None:
    """Of another make: it does not know the flag, or promises more than it gives."""

    class Other(Server):
        def health(self) -> dict[str, Json]:
            return {**super().health(), "routed_experts": says}

        def completions(self, body: dict[str, Json]) -> dict[str, Json]:
            body.pop("return_routed_experts", None)
            return super().completions(body)

    with listening(Other(LocalSampler.from_folder(folder), CHAT, "other")) as address:
        sampler = RemoteSampler(address, deadline_s=30.0)
        assert len(dict(sampler.sample([Request((1,), 0, 2)], SamplingParams(2)))[0].token_ids) == 2
        with pytest.raises(UserError, match=rf"sampler at {address}: does not report the experts .*{message}"):
            list(sampler.sample([Request((1,), 0, 2)], SamplingParams(2, routed_experts=True)))
        sampler.close()


def test_trtllm_says_what_it_needs() -> None:
    with pytest.raises(UserError, match=r"hardware.sampler: trtllm: TensorRT-LLM >= 1.3.0rc21 is not installed here"):
        TrtLlmSampler({})
