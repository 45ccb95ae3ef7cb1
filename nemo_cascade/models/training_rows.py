"""Packed rows for NeMo's data hooks: what `train_ds` and `validation_ds` of a CascadeModel may say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from omegaconf import MISSING
from torch.utils.data import DataLoader, IterableDataset

from nemo_cascade.config.paths import NANO_TOKENIZER
from nemo_cascade.config.schema import DataConfig, SftConfig
from nemo_cascade.config.strict import build
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.data.conversations import conversation_stream
from nemo_cascade.data.packing import pack
from nemo_cascade.domains import load
from nemo_cascade.types import Batch, Sequence, UserError

Row = dict[str, torch.Tensor]


@dataclass
class FileRows:
    """Tokenised sequences of a JSON-lines file; a row of `micro_batch_tokens` is one batch."""

    file: str = MISSING  # rows with the lists token_ids and loss_mask
    micro_batch_tokens: int = 4096


@dataclass
class StageRows:
    """The conversations of an SFT stage, under the keys of its stage file; a step's tokens are one packed row."""

    data: DataConfig = field(default_factory=DataConfig)
    tokens_per_step: int = MISSING  # over all ranks
    max_sequence_tokens: int = 512
    num_steps: Optional[int] = None  # steps of an epoch; None: endless, the Trainer's max_steps ends it
    seed: int = 1
    tokenizer: Optional[str] = None  # folder; None: the nano tokenizer


def loader(config: Mapping[str, Any], source: str) -> DataLoader[Row]:
    """One packed row per item; the row is the batch. With the key `file` a FileRows, else a StageRows."""
    keys = {key: value for key, value in config.items() if key not in ("defer_setup", "shuffle")}
    if "file" not in keys and "data" not in keys:
        raise UserError(
            f"{source}: key file (JSON lines with token_ids and loss_mask) or data (as in an SFT stage) is missing"
        )
    if "file" in keys:
        return DataLoader(_RowsOfFile(build(FileRows, keys, source), source), batch_size=None)
    return DataLoader(_RowsOfStage(build(StageRows, keys, source)), batch_size=None)


def _row(batch: Batch) -> Row:
    """The tensors of a packed row that a language-model loss needs."""
    return {
        "tokens_T": batch.tokens_T,
        "targets_T": batch.targets_T,
        "loss_mask_T": batch.loss_mask_T,
        "cu_seqlens": batch.cu_seqlens,
    }


class _RowsOfFile(IterableDataset[Row]):
    """The rows of a file, packed once per pass."""

    def __init__(self, config: FileRows, source: str) -> None:
        self.file, self.micro_batch_tokens = Path(config.file), config.micro_batch_tokens
        if not self.file.is_file():
            raise UserError(f"{source}: file {self.file} does not exist")

    def __iter__(self) -> Iterator[Row]:
        sequences = []
        for number, line in enumerate(self.file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                sequences.append(Sequence(tuple(row["token_ids"]), tuple(row["loss_mask"])))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                message = f"{self.file}:{number}: a row needs the lists token_ids and loss_mask ({error})"
                raise UserError(message) from error
        yield from map(_row, pack(sequences, self.micro_batch_tokens).batches)


class _RowsOfStage(IterableDataset[Row]):
    """Step by step what the stage's own loop would train on: item k holds the sequences of step k."""

    def __init__(self, config: StageRows) -> None:
        stage = SftConfig(
            kind="sft", init="random", num_steps=config.num_steps or 1, data=config.data,
            tokens_per_step=config.tokens_per_step, max_sequence_tokens=config.max_sequence_tokens,
        )  # fmt: skip
        data = config.data
        names = [*data.domains, *(["preference"] if data.judge_share else [])]
        domains = {name: load(name, None, data.options.get(name)) for name in names}
        self.stream = conversation_stream(
            stage, domains, ChatTokenizer(config.tokenizer or NANO_TOKENIZER), config.seed,
            parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(),
        )  # fmt: skip
        self.num_steps, self.tokens_per_step = config.num_steps, config.tokens_per_step

    def __iter__(self) -> Iterator[Row]:
        for step in itertools.count() if self.num_steps is None else range(self.num_steps):
            (batch,) = pack(self.stream.take(step), self.tokens_per_step).batches
            yield _row(batch)
