"""What the tests of rollouts share: random weights, the real tokenizer, small domains, a sampler with a script."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

import nemo_cascade
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.domains import SingleTurn
from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.types import (
    Completion,
    Invalid,
    Message,
    Outcome,
    Request,
    SamplingParams,
    Scored,
    Task,
    Transcript,
)

NANO_TOKENIZER = Path(nemo_cascade.__file__).parent / "models" / "nano" / "tokenizer"


def tiny_config(**changes: int | float | str) -> NemotronHConfig:
    """Small enough for a test, odd enough to show a mixed-up dimension."""
    fields: dict[str, int | float | str] = {
        "vocab_size": 512, "hidden_size": 48, "hybrid_override_pattern": "M*EME", "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 16,
        "n_groups": 2, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "moe_shared_expert_intermediate_size": 56, "chunk_size": 16,
    }  # fmt: skip
    return NemotronHConfig(**{**fields, **changes})  # type: ignore[arg-type]


def random_weights(config: NemotronHConfig, seed: int = 0, scale: float = 0.25) -> dict[str, torch.Tensor]:
    """Weights far from any initialisation, so that every term of the forward pass matters."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    for name, shape in config.tensor_shapes().items():
        tensor = torch.randn(shape, generator=generator) * scale
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            tensor = tensor + 1.0
        elif name.endswith("A_log"):
            tensor = torch.rand(shape, generator=generator) * 2.0
        elif name.endswith("dt_bias"):
            tensor = torch.rand(shape, generator=generator) * 2.0 - 3.0
        named[name] = tensor
    return named


def nano_chat() -> ChatTokenizer:
    """The shipped tokenizer and template."""
    return ChatTokenizer(NANO_TOKENIZER)


class EchoDomain(SingleTurn):
    """Reward 1 when the answer is `truth["word"]`. The first `invalid_first` verdicts of an answer are Invalid."""

    name = "echo"

    def __init__(self, invalid_first: int = 0, delay_s: float = 0.0) -> None:
        super().__init__()
        self.invalid_first, self.delay_s = invalid_first, delay_s
        self.asked: dict[tuple[str, str], int] = {}
        self.lock = threading.Lock()

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        time.sleep(self.delay_s)
        answer = transcript.final.content
        with self.lock:
            key = (task.id, answer)
            self.asked[key] = self.asked.get(key, 0) + 1
            if self.asked[key] <= self.invalid_first:
                return Invalid("wall clock")
        if answer == "break":
            return Invalid("judge down")
        return Scored(1.0 if answer == task.truth["word"] else 0.0)


class LengthDomain(EchoDomain):
    """Reward 1 for an answer of even length: random weights earn it about half of the time."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(delay_s=delay_s)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        time.sleep(self.delay_s * (len(transcript.final.content) % 3))
        return Scored(float(len(transcript.final.content) % 2 == 0))


class RankDomain(SingleTurn):
    """Rewards that depend on the whole group: the longest answer wins."""

    name = "rank"

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        return self.score_group(task, [transcript])[0]

    def score_group(self, task: Task, transcripts_G: Sequence[Transcript]) -> list[Outcome]:
        lengths = [len(transcript.final.content) for transcript in transcripts_G]
        return [Scored(float(length == max(lengths))) for length in lengths]


class CountEpisode:
    """Asks for the next number until it has heard three."""

    def __init__(self, closed: list[str], task_id: str) -> None:
        self.heard = 0
        self.closed, self.task_id = closed, task_id

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        self.heard += 1
        return None if self.heard == 3 else (Message("user", f"next {self.heard}"),)

    def close(self) -> None:
        self.closed.append(self.task_id)


class CountDomain(SingleTurn):
    """Three turns: "1", "2", "3"."""

    name = "count"
    max_turns = 4

    def __init__(self, max_turns: int = 4) -> None:
        super().__init__()
        self.max_turns = max_turns
        self.closed: list[str] = []

    def begin(self, task: Task) -> CountEpisode:  # type: ignore[override]
        return CountEpisode(self.closed, task.id)

    def score(self, task: Task, transcript: Transcript) -> Outcome:
        said = [message.content for message in transcript.messages if message.role == "assistant"]
        return Scored(float(said == ["1", "2", "3"]))


class StuckDomain(CountDomain):
    """Environments that hang until `release` is set: where `begin` is said to, or at a turn that says "hang"."""

    name = "stuck"

    def __init__(self, at_begin: bool = False) -> None:
        super().__init__()
        self.at_begin = at_begin
        self.release = threading.Event()

    def begin(self, task: Task) -> CountEpisode:  # type: ignore[override]
        if self.at_begin:
            self.release.wait()
        return StuckEpisode(self, task.id)


class StuckEpisode(CountEpisode):
    def __init__(self, domain: StuckDomain, task_id: str) -> None:
        super().__init__(domain.closed, task_id)
        self.release = domain.release

    def reply(self, message: Message) -> tuple[Message, ...] | None:
        if message.content == "hang":
            self.release.wait()
        return super().reply(message)


class ScriptedSampler:
    """A Sampler that writes what `answer(prompt text, seed)` says, in a shuffled order of arrival."""

    def __init__(self, chat: ChatTokenizer, answer: Callable[[str, int], str]) -> None:
        self.chat, self.answer = chat, answer
        self.version = 5
        self.batches: list[list[Request]] = []

    def sample(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[int, Completion]]:
        self.batches.append(list(requests))
        for index in sorted(range(len(requests)), key=lambda place: requests[place].seed):
            request = requests[index]
            text = self.answer(self.chat.decode(request.token_ids), request.seed)
            ids = [*self.chat.encode_text(text), self.chat.im_end_id]
            budget = min(request.max_new_tokens, params.max_new_tokens)
            cut = tuple(ids[:budget])
            finish = "stop" if len(ids) <= budget else "length"
            yield index, Completion(cut, tuple(-0.5 for _ in cut), finish, self.version)

    def load_weights(self, named: Iterator[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = version

    def close(self) -> None:
        self.batches.clear()


def write_folder(folder: Path, config: NemotronHConfig, weights: dict[str, torch.Tensor]) -> Path:
    """A Hugging Face folder with the nano tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf_json()))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    for file in NANO_TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)
    return folder
