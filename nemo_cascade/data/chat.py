"""Conversations to token ids and back, so that training sees exactly the ids that sampling saw.

Text is encoded once, when it enters. Sampled ids are never decoded and encoded again: a multi-turn rollout appends
`reply_ids` after them, and `encode_conversation` builds SFT sequences from the same parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from nemo_cascade.data import template
from nemo_cascade.data.rows import too_deep
from nemo_cascade.data.template import CONTROL, IM_END, Piece, render_prompt
from nemo_cascade.types import Json, Message, Task, Tool, ToolCall, UserError

__all__ = ["ChatTokenizer", "parse_text", "render_prompt"]

CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\n?(.*?)</function>\s*</tool_call>\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
SURROGATE = re.compile("[\ud800-\udfff]")
TRAIN = ("all_assistant", "last_assistant")


def parse_text(text: str, thinking: bool, tools: Sequence[Tool] = ()) -> Message:
    """A sampled assistant turn (no end mark) as reasoning, content and tool calls.

    Thinking mode: text before the first </think> is reasoning; without one everything is reasoning and content is
    empty, so that an unfinished thought is never graded. Malformed tool-call XML stays in the content and makes no
    call. Arguments are strings, or the JSON value where a tool's schema names another type.
    """
    reasoning = ""
    if thinking:
        reasoning, closed, text = text.partition("</think>")
        if not closed:
            return Message("assistant", "", reasoning.strip())
    content, calls = _split_calls(text, tools)
    return Message("assistant", content.strip(), reasoning.strip(), calls)


def _split_calls(text: str, tools: Sequence[Tool]) -> tuple[str, tuple[ToolCall, ...]]:
    start = text.find("<tool_call>")
    if start < 0:
        return text, ()
    calls: list[ToolCall] = []
    at, end = start, len(text.rstrip())
    while at < end:
        match = CALL.match(text, at)
        call = _call(match.group(1), match.group(2), tools) if match else None
        if match is None or call is None:
            return text, ()
        calls.append(call)
        at = match.end()
    return text[:start], tuple(calls)


def _call(name: str, body: str, tools: Sequence[Tool]) -> ToolCall | None:
    """One call, or None when something other than parameters stands in its body or one is given twice."""
    properties = next((tool.parameters.get("properties") or {} for tool in tools if tool.name == name), {})
    arguments: dict[str, Json] = {}
    at, end = len(body) - len(body.lstrip("\n")), len(body.rstrip())
    while at < end:
        match = PARAMETER.match(body, at)
        if match is None or match.group(1) in arguments:
            return None
        field = properties.get(match.group(1)) or {}
        arguments[match.group(1)] = _typed(match.group(2), field.get("type", "string"))
        at = match.end()
    return ToolCall(name, arguments)


def _typed(text: str, kind: Json) -> Json:
    """A value as its schema types it; text that is no JSON of that kind stays text and fails the tool's own check."""
    if kind == "string":
        return text
    try:
        value = json.loads(text)
    except ValueError:  # also an integer too long for the interpreter
        return text
    except RecursionError:
        return text
    return text if too_deep(value) else value


class ChatTokenizer:
    """A Hugging Face tokenizer folder with the chat template of Cascade 2.

    `stop_ids` ends an assistant turn: <|im_end|> first, then the model's end-of-text token where it has one.
    `begin_ids` (the begin-of-text token, or nothing) opens plain documents only; conversations have none.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"tokenizer {folder}: no tokenizer.json there; point `tokenizer` at a Hugging Face folder")
        self.folder = str(folder)
        self._tokenizer = Tokenizer.from_file(str(path))
        added = self._tokenizer.get_added_tokens_decoder()
        special = [token.content for token in added.values() if token.special]
        texts = sorted({*special, *CONTROL}, key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(text) for text in texts))
        self.im_end_id = self._id(IM_END)
        eos = self._config_token("eos_token")
        stops = (self.im_end_id, self._tokenizer.token_to_id(eos) if eos else None)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
        bos = self._config_token("bos_token")
        self.begin_ids: tuple[int, ...] = (self._id(bos),) if bos else ()
        pad = self._config_token("pad_token")
        self.pad_id: int = self._id(pad) if pad else 0

    def _id(self, text: str) -> int:
        token = self._tokenizer.token_to_id(text)
        if token is None:
            raise UserError(f"tokenizer {self.folder}: no token {text}; the chat template needs it")
        return token

    def _config_token(self, key: str) -> str:
        path = Path(self.folder) / "tokenizer_config.json"
        value = json.loads(path.read_text()).get(key) if path.is_file() else None
        return value["content"] if isinstance(value, dict) else value or ""

    @property
    def vocab_size(self) -> int:
        """Entries with added tokens; the model's embedding may be padded beyond it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def refuse_other_tokens(self, folder: str | Path) -> None:
        """UserError when another folder's tokenizer, a teacher's, gives texts other ids; one without it passes."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file() or path.read_bytes() == (Path(self.folder) / "tokenizer.json").read_bytes():
            return
        mine, other = (of.get_vocab(with_added_tokens=True) for of in (self._tokenizer, Tokenizer.from_file(str(path))))
        if mine != other:
            differing = sorted({text for text, _ in mine.items() ^ other.items()})
            raise UserError(
                f"{path}: {len(differing)} entries differ from the tokenizer {self.folder}, for example "
                f"{differing[0]!r}; a teacher that reads other tokens cannot score the student's: choose another one"
            )

    def encode_text(self, text: str) -> list[int]:
        """Untrusted plain text: control tokens spelt in it are encoded as characters."""
        return self._encode([Piece(text, False)])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Ids to text, control tokens shown."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode the joined text at once, as any engine would; only control texts in untrusted text are cut open.

        Lone surrogates, which JSON can spell and no encoding can hold, are read as U+FFFD.
        """
        text = SURROGATE.sub("\ufffd", "".join(piece.text for piece in pieces))
        untrusted: list[tuple[int, int]] = []
        at = 0
        for piece in pieces:
            if not piece.trusted and piece.text:
                untrusted.append((at, at + len(piece.text)))
            at += len(piece.text)
        cuts = [0]
        passed = 0  # both go forward: comparing each with each would take minutes for a turn of many calls
        for match in self._control.finditer(text):
            while passed < len(untrusted) and untrusted[passed][1] <= match.start():
                passed += 1
            if passed < len(untrusted) and untrusted[passed][0] < match.end():
                cuts += [match.start(), match.start() + 1]  # "<" alone, then the rest, which is no added token
        cuts.append(len(text))
        ids: list[int] = []
        for begin, end in pairwise(cuts):
            if begin < end:
                ids += self._tokenizer.encode(text[begin:end], add_special_tokens=False).ids
        return ids

    def messages_ids(self, messages: Sequence[Message], tools: Sequence[Tool], thinking: bool) -> list[int]:
        """A prompt with its generation prompt."""
        return self._encode(template.prompt_pieces(messages, tools, thinking))

    def prompt_ids(self, task: Task) -> list[int]:
        """The prompt of a task in its own mode."""
        return self.messages_ids(task.messages, task.tools, task.thinking)

    def completion_ids(self, message: Message, thinking: bool) -> list[int]:
        """A teacher's assistant turn as the model would have sampled it, <|im_end|> included."""
        return self._encode(template.completion_pieces(message, thinking))

    def reply_ids(self, messages: Sequence[Message], thinking: bool) -> list[int]:
        """What follows a sampled <|im_end|>: newline, the environment's turns, the next generation prompt."""
        pieces = [Piece("\n", True), *template.turn_pieces(messages, -1), template.generation_prompt(thinking)]
        return self._encode(pieces)

    def parse_assistant(self, sampled: Sequence[int] | str, thinking: bool, tools: Sequence[Tool] = ()) -> Message:
        """Sampled ids (or text) of one assistant turn as a Message; ids from the first stop token on are dropped."""
        if isinstance(sampled, str):
            return parse_text(sampled.removesuffix(IM_END), thinking, tools)
        stop = next((index for index, token in enumerate(sampled) if token in self.stop_ids), len(sampled))
        return parse_text(self.decode(sampled[:stop]), thinking, tools)

    def encode_conversation(
        self, task: Task, messages: Sequence[Message], train: str = "all_assistant"
    ) -> tuple[list[int], list[int]]:
        """(token ids, loss mask) of a demonstrated conversation: the very ids a rollout with these answers has.

        The mask is 1 on assistant tokens with their <|im_end|>: of every assistant turn, or of the last one only.
        """
        if train not in TRAIN:
            raise UserError(f"train: {train!r} is not one of {', '.join(TRAIN)}")
        if not messages or messages[0].role != "assistant" or messages[-1].role != "assistant":
            raise UserError(f"task {task.id}: a conversation begins and ends with an assistant turn")
        ids = self.prompt_ids(task)
        mask = [0] * len(ids)
        replies: list[Message] = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                replies.append(message)
                continue
            if index:
                reply = self.reply_ids(replies, task.thinking)
                ids += reply
                mask += [0] * len(reply)
                replies = []
            completion = self.completion_ids(message, task.thinking)
            ids += completion
            mask += [int(train == "all_assistant" or index + 1 == len(messages))] * len(completion)
        return ids, mask
