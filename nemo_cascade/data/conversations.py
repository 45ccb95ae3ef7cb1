"""What supervised fine-tuning reads: demonstrations, conversation files and plain documents, as tokens per step."""

from __future__ import annotations

import array
import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from nemo_cascade.config.schema import SftConfig
from nemo_cascade.data import nano_corpus, rows
from nemo_cascade.data.chat import ChatTokenizer, parse_text
from nemo_cascade.data.mixture import check_weights, slots
from nemo_cascade.data.splits import content_id, task_content
from nemo_cascade.protocols import Domain
from nemo_cascade.types import Json, Message, Split, Task, ToolCall, UserError
from nemo_cascade.types import Sequence as TokenSequence

FILES = "conversations"  # the source behind `data.conversations`; its weight is 1 beside those of `data.domains`
CORPUS, JUDGE = "corpus", "judge"
ROUND = 32  # conversations drawn at a time until a step is full
BARREN_ROUNDS = 32  # rounds without one sequence that is short enough
MEASURED = 64  # rows of a file whose length is measured

Conversation = tuple[Task, tuple[Message, ...]]


@runtime_checkable
class JudgedDomain(Protocol):
    """A domain that can label pairs of answers."""

    def judge_conversations(self, split: Split, count: int, seed: int) -> list[Conversation]:
        """`count` comparisons: the judge's prompt as the Task, its verdict as the answer."""


class ConversationSource(Protocol):
    """Tokenised conversations of one kind."""

    def take(self, count: int, rng: random.Random, stretch: int, used: int) -> list[TokenSequence]:
        """`count` sequences. Files read on from row `used` of a stretch (one per step and rank); others draw."""


class Demonstrations:
    """A domain's own demonstrations of train tasks, in the thinking mode for `thinking_share` of them."""

    def __init__(self, domain: Domain, tokenizer: ChatTokenizer, flaw_rate: float, thinking_share: float) -> None:
        self._domain, self._tokenizer = domain, tokenizer
        self._flaw_rate, self._thinking_share = flaw_rate, thinking_share

    def take(self, count: int, rng: random.Random, stretch: int, used: int) -> list[TokenSequence]:
        """Fresh tasks, each demonstrated once."""
        sequences = []
        for task in self._domain.tasks("train", count, rng.getrandbits(48)):
            moded = dataclasses.replace(task, thinking=rng.random() < self._thinking_share)
            messages = self._domain.demonstrate(moded, rng.getrandbits(32), self._flaw_rate)
            sequences.append(as_sequence(self._tokenizer, moded, messages))
        return sequences


class Documents:
    """Plain text of the nano corpus; every token is trained."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer

    def take(self, count: int, rng: random.Random, stretch: int, used: int) -> list[TokenSequence]:
        """`count` fresh documents between the tokenizer's begin and end marks."""
        sequences = []
        for _ in range(count):
            text = self._tokenizer.encode_text(nano_corpus.document(rng))
            ids = (*self._tokenizer.begin_ids, *text, self._tokenizer.stop_ids[-1])
            sequences.append(TokenSequence(ids, (1,) * len(ids)))
        return sequences


class JudgePairs:
    """Pairs of answers with the verdict that the preference domain's rubric gives: what the judge is trained on."""

    def __init__(self, domain: Domain, tokenizer: ChatTokenizer) -> None:
        if not isinstance(domain, JudgedDomain):
            raise UserError(f"data.judge_share: domain {domain.name} has no judge_conversations")
        self._domain, self._tokenizer = domain, tokenizer

    def take(self, count: int, rng: random.Random, stretch: int, used: int) -> list[TokenSequence]:
        """Fresh pairs."""
        pairs = self._domain.judge_conversations("train", count, rng.getrandbits(48))
        return [as_sequence(self._tokenizer, task, messages) for task, messages in pairs]


class ConversationFiles:
    """JSONL rows with `messages`, read by byte offset so that files larger than memory work.

    Each epoch has its own order. A stretch holds as many rows as the token budget needs at the mean length of the first
    rows, so that consecutive steps walk through the file, up to the spread of the lengths.
    """

    def __init__(self, paths: Sequence[str], tokenizer: ChatTokenizer, seed: int, tokens_per_stretch: float) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._places: list[tuple[str, array.array[int]]] = [(path, _offsets(path)) for path in paths]
        self.size = sum(len(offsets) for _, offsets in self._places)
        if not self.size:
            raise UserError(f"data.conversations: no rows in {', '.join(paths)}")
        self._order: tuple[int, list[int]] = (-1, [])
        probe = range(0, self.size, max(1, self.size // MEASURED))
        lengths = [len(as_sequence(tokenizer, *self.read(index)).token_ids) for index in probe]
        self.rows_per_stretch = max(1, round(tokens_per_stretch * len(lengths) / sum(lengths)))

    def take(self, count: int, rng: random.Random, stretch: int, used: int) -> list[TokenSequence]:
        """The next rows of the stretch."""
        first = stretch * self.rows_per_stretch + used
        places = [self._shuffled(at // self.size)[at % self.size] for at in range(first, first + count)]
        return [as_sequence(self._tokenizer, *self.read(index)) for index in places]

    def read(self, index: int) -> Conversation:
        """Row `index` over all files."""
        for path, offsets in self._places:
            if index < len(offsets):
                with Path(path).open("rb") as lines:
                    lines.seek(offsets[index])
                    line = lines.readline()
                return parse_conversation(_json_row(line, f"{path}:row {index + 1}"), f"{path}:row {index + 1}")
            index -= len(offsets)
        raise UserError(f"data.conversations: row {index} is beyond the end of the files")

    def _shuffled(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(self.size))
            random.Random(f"conversations/{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _offsets(path: str) -> array.array[int]:
    """Byte offsets of the non-empty lines."""
    if not Path(path).is_file():
        raise UserError(f"data.conversations: {path}: no such file")
    offsets = array.array("Q")
    at = 0
    with Path(path).open("rb") as lines:
        for line in lines:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return offsets


def _json_row(line: bytes, where: str) -> dict[str, Json]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
    return row


def parse_conversation(row: Mapping[str, Json], where: str) -> Conversation:
    """A released SFT row: the prompt up to the last user turn as the Task, the assistant and tool turns after it.

    Earlier turns are context as the template shows them (reasoning dropped) and are not trained, because a model never
    produces them in that form. Reasoning is `<think>...</think>` inside the content, or the field `reasoning_content`.
    """
    items = rows.field(row, "messages", list, where)
    messages = [_message(item, f"{where} messages[{index}]") for index, item in enumerate(items)]
    last_user = max((index for index, message in enumerate(messages) if message.role == "user"), default=-1)
    prompt, answers = tuple(messages[: last_user + 1]), tuple(messages[last_user + 1 :])
    if not answers or answers[0].role != "assistant" or answers[-1].role != "assistant":
        raise UserError(f"{where}: field 'messages' must end with an assistant turn after the last user turn")
    thinks = row.get("thinking")
    thinking = thinks if isinstance(thinks, bool) else any(answer.reasoning for answer in answers)
    tools = rows.input_tools({"responses_create_params": {"tools": row.get("tools") or []}}, where)
    return Task(content_id(FILES, task_content(prompt, {})), FILES, prompt, tools, thinking), answers


def _message(item: Json, where: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f"{where}: a message must be an object, this is {type(item).__name__}")
    role = rows.field(item, "role", str, where)
    content = rows.content_text(item.get("content") or "", where)
    if role == "tool":
        return Message("tool", content)
    if role != "assistant":
        if role not in rows.ROLES:
            raise UserError(f"{where}: field 'role' is {role!r}; known: {', '.join((*rows.ROLES, 'tool'))}")
        return Message(rows.ROLES[role], content)
    head, opened, rest = content.partition("<think>")
    thought = bool(opened) and not head.strip()
    message = parse_text(rest if thought else content, thinking=thought)
    calls = tuple(_tool_call(call, where) for call in item.get("tool_calls") or [])
    given = item.get("reasoning_content")
    reasoning = given.strip() if isinstance(given, str) else message.reasoning
    return Message("assistant", message.content, reasoning, message.tool_calls + calls)


def _tool_call(call: Json, where: str) -> ToolCall:
    body = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(body, dict):
        raise UserError(f"{where}: field 'tool_calls' must hold objects")
    arguments = rows.loose_json(body.get("arguments") or {}, "arguments", where)
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: field 'arguments' must be an object, this is {type(arguments).__name__}")
    return ToolCall(rows.field(body, "name", str, where), arguments)


def as_sequence(tokenizer: ChatTokenizer, task: Task, messages: Sequence[Message]) -> TokenSequence:
    """One conversation as the ids RL would see, trained on all assistant turns."""
    ids, mask = tokenizer.encode_conversation(task, messages)
    return TokenSequence(tuple(ids), tuple(mask))


class ConversationStream:
    """Token sequences per step: about `tokens_per_step` tokens over all ranks, mixed by shares of conversations.

    Sequences longer than `max_sequence_tokens` are dropped and counted in `dropped`, never cut: half a demonstration
    teaches a wrong ending. With `full_loss` every token is trained, prompts too (pre-training).
    """

    def __init__(  # noqa: PLR0913 - what a step is made of
        self,
        sources: Mapping[str, ConversationSource],
        shares: Mapping[str, float],
        tokens_per_step: int,
        max_sequence_tokens: int,
        seed: int,
        full_loss: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._sources, self._shares = dict(sources), check_weights("data.domains", shares)
        self._budget, self._longest = tokens_per_step // world, max_sequence_tokens
        self._seed, self._full_loss, self._rank, self._world = seed, full_loss, rank, world
        self.dropped: Counter[str] = Counter()

    def take(self, step: int) -> list[TokenSequence]:
        """This rank's sequences of a step, the same at every call."""
        sequences: list[TokenSequence] = []
        room, used, barren = self._budget, Counter[str](), 0
        for round_ in itertools.count():
            rng = random.Random(f"{self._seed}/{step}/{self._rank}/{round_}")
            order = slots(self._shares, ROUND, rng)
            queues: dict[str, list[TokenSequence]] = {}
            for name, count in sorted(Counter(order).items()):
                queues[name] = self._sources[name].take(count, rng, step * self._world + self._rank, used[name])
                used[name] += count
            before = len(sequences)
            for name in order:
                sequence = queues[name].pop(0)
                length = len(sequence.token_ids)
                if length > min(self._longest, self._budget):
                    self.dropped[name] += 1
                elif length > room:
                    return sequences
                else:
                    room -= length
                    sequences.append(self._trained(sequence))
            barren = barren + 1 if len(sequences) == before else 0
            if barren == BARREN_ROUNDS:
                break
        if not sequences:
            seen = BARREN_ROUNDS * ROUND
            raise UserError(f"max_sequence_tokens: {seen} conversations were all longer than {self._longest} tokens")
        return sequences

    def _trained(self, sequence: TokenSequence) -> TokenSequence:
        if not self._full_loss:
            return sequence
        return dataclasses.replace(sequence, loss_mask=(1,) * len(sequence.token_ids))


def conversation_stream(
    cfg: SftConfig, domains: Mapping[str, Domain], tokenizer: ChatTokenizer, seed: int, rank: int = 0, world: int = 1
) -> ConversationStream:
    """The stream a stage file describes.

    `data.domains` weighs each domain's demonstrations against the files of `data.conversations`, whose weight is 1;
    `corpus_share` of all sequences are documents and `judge_share` are verdicts on generated preference pairs.
    """
    data = cfg.data
    rest = 1.0 - data.corpus_share - data.judge_share
    if min(rest, data.corpus_share, data.judge_share) < 0.0:
        raise UserError("data: corpus_share and judge_share must be at least 0 and at most 1 together")
    sources: dict[str, ConversationSource] = {
        name: Demonstrations(domains[name], tokenizer, data.flaw_rates.get(name, data.flaw_rate), data.thinking_share)
        for name in data.domains
    }
    weights = dict(data.domains) | ({FILES: 1.0} if data.conversations else {})
    shares = check_weights("data.domains", weights) if weights or rest > 0.0 else {}
    shares = {name: share * rest for name, share in shares.items()}
    if data.conversations:
        budget = cfg.tokens_per_step / world * shares[FILES]
        sources[FILES] = ConversationFiles(list(data.conversations), tokenizer, seed, budget)
    if data.corpus_share > 0.0:
        sources[CORPUS], shares[CORPUS] = Documents(tokenizer), data.corpus_share
    if data.judge_share > 0.0:
        if "preference" not in domains:
            raise UserError("data.judge_share: the pairs come from the domain preference, which is not loaded")
        sources[JUDGE], shares[JUDGE] = JudgePairs(domains["preference"], tokenizer), data.judge_share
    return ConversationStream(
        sources, shares, cfg.tokens_per_step, cfg.max_sequence_tokens, seed, data.full_loss, rank, world
    )
