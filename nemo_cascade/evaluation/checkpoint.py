"""What one can do with a single checkpoint at hand: evaluate it, talk to it. Needs torch; the CLI imports it late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from nemo_cascade.config.paths import hf_folder, tokenizer_folder
from nemo_cascade.config.schema import EvaluationConfig
from nemo_cascade.config.schema_data import JudgeAddress
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.domains import Services, load
from nemo_cascade.evaluation.benchmark import Benchmark, Row
from nemo_cascade.evaluation.intervals import bootstrap_mean
from nemo_cascade.models.hf_folder import read_config
from nemo_cascade.reward.judge import Judge, judge_at
from nemo_cascade.rollout.local import LocalSampler
from nemo_cascade.rollout.server_process import start_server
from nemo_cascade.types import Interval, Message, Request, SamplingParams


def benchmark_rows(
    reference: str,
    config: EvaluationConfig,
    workers: int = 4,
    judge: JudgeAddress | None = None,
    repair_judge: JudgeAddress | None = None,
) -> list[Row]:
    """Score a checkpoint (`hf:nano`, a folder) on the tasks of the ledger, one row per task as in evaluation files.

    The tasks and draws are those of the cascade's own evaluations, so the numbers can be compared with a report's.
    """
    folder = hf_folder(reference)
    chat = ChatTokenizer(tokenizer_folder(folder, read_config(folder).vocab_size))
    with ExitStack() as stack:
        services = Services()
        stack.callback(services.close)
        if judge is not None and judge.named:
            services.equivalence_judge = stack.enter_context(open_judge(judge))
        if repair_judge is not None and repair_judge.named:
            services.repair_judge = stack.enter_context(open_judge(repair_judge))
        domains = {name: load(name, services, config.options.get(name)) for name in config.domains}
        sampler = LocalSampler.from_folder(folder)
        stack.callback(sampler.close)
        return stack.enter_context(Benchmark(config, domains, sampler, chat, workers)).run()


def evaluate_folder(
    reference: str,
    config: EvaluationConfig,
    workers: int = 4,
    judge: JudgeAddress | None = None,
    repair_judge: JudgeAddress | None = None,
) -> dict[tuple[str, str, str], Interval]:
    """The scores of a checkpoint: (domain, split, mode) -> mean with interval, verdicts that are Invalid left out."""
    cells: dict[tuple[str, str, str], list[float]] = {}
    for row in benchmark_rows(reference, config, workers, judge, repair_judge):
        if row["valid"]:
            cell = (str(row["domain"]), str(row["split"]), str(row["mode"]))
            cells.setdefault(cell, []).append(float(str(row["score"])))
    return {cell: bootstrap_mean(scores) for cell, scores in cells.items()}


@contextmanager
def open_judge(config: JudgeAddress) -> Iterator[Judge]:
    """A judge at its address, or a checkpoint served on loopback meanwhile."""
    with ExitStack() as stack:
        url = config.url
        if url is None:
            server = start_server(hf_folder(str(config.serve)))
            stack.callback(server.close)
            url = f"{server.url}/v1"
        yield stack.enter_context(judge_at(url, config))


@dataclass
class Conversation:
    """A talk with one checkpoint. Every answer is appended, so the next message continues it."""

    reference: str
    params: SamplingParams
    thinking: bool = True
    seed: int = 0
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        folder = hf_folder(self.reference)
        self.chat = ChatTokenizer(tokenizer_folder(folder, read_config(folder).vocab_size))
        self.sampler = LocalSampler.from_folder(folder)
        if self.system:
            self.messages.append(Message("system", self.system))

    def say(self, text: str) -> Message:
        """Send a user message; returns the assistant's turn with its reasoning."""
        self.messages.append(Message("user", text))
        prompt = self.chat.messages_ids(self.messages, (), self.thinking)
        stops = SamplingParams(
            self.params.max_new_tokens,
            self.params.temperature,
            self.params.top_p,
            self.params.top_k,
            self.chat.stop_ids,
        )
        request = Request(tuple(prompt), self.seed + len(self.messages), self.params.max_new_tokens)
        ((_, completion),) = self.sampler.sample([request], stops)
        answer = self.chat.parse_assistant(completion.token_ids, self.thinking)
        self.messages.append(answer)
        return answer


def reply(
    reference: str, messages: Sequence[str], params: SamplingParams, thinking: bool = True, seed: int = 0
) -> list[Message]:
    """The answers of a checkpoint to user messages sent one after the other."""
    talk = Conversation(reference, params, thinking, seed)
    return [talk.say(message) for message in messages]
