"""Do two checkpoints, or two engines on one, compute the same? Needs torch; the CLI imports it late.

The two sides are loaded one after the other, so that a comparison needs the memory of one model and two traces.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_cascade.config.paths import hf_folder, tokenizer_folder
from nemo_cascade.data.chat import ChatTokenizer
from nemo_cascade.domains import Services, available, load
from nemo_cascade.models import convert, nemotron_h, parallel
from nemo_cascade.models.config import NO_CLAMP, NemotronHConfig
from nemo_cascade.models.hf_folder import read_config, read_json
from nemo_cascade.models.parity import (
    Difference,
    Parity,
    Prints,
    difference,
    tensor_differences,
    tensor_prints,
)
from nemo_cascade.models.trace import Engine, MegatronEngine, TransformersEngine, points
from nemo_cascade.types import UserError

MEGATRON, TRANSFORMERS = "megatron", "transformers"
ENGINES = (MEGATRON, TRANSFORMERS)
NEMO = ".nemo"
MODES = {"packed": True, "unpacked": False}
# fields that change what a model computes but not which tensors it has: compared, and named where they differ
COMPUTED = ("routed_scaling_factor", "num_experts_per_tok", "layer_norm_epsilon")
# fields that only matter to a random start, to serving or to speed
IDLE = (
    "chunk_size", "max_position_embeddings", "initializer_range", "rescale_prenorm_residual", "time_step_min",
    "time_step_max", "time_step_floor", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One of the two: where it lies and what runs it. `folder` is a Hugging Face folder or a `.nemo` file."""

    label: str
    folder: Path
    engine: str

    @classmethod
    def of(cls, label: str, reference: str, engine: str) -> Side:
        """The side behind `hf:nano`, a Hugging Face folder, a `.nemo` file or the folder of a finished stage."""
        path = hf_folder(reference)
        if path.suffix == NEMO:
            if not path.is_file():
                raise UserError(f"{label}: {path}: no such file")
            return cls(label, path, engine)
        if not path.is_dir():
            kinds = "a Hugging Face folder, a .nemo file or the folder of a finished stage"
            raise UserError(f"{label}: {path}: no such folder; give {kinds}")
        if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
            if not (path / "record.json").is_file():
                raise UserError(f"{label}: {path}: the stage is not finished; run it to its end first")
            path = path / "hf"
        return cls(label, path, engine)

    @property
    def is_nemo(self) -> bool:
        """Whether it is a `.nemo` file."""
        return self.folder.suffix == NEMO

    @contextmanager
    def open(self) -> Iterator[tuple[NemotronHConfig, Engine]]:
        """Its architecture and a loaded engine; memory is given back at the end."""
        if self.engine == MEGATRON:
            model = self._megatron()
            yield model.hf_config, MegatronEngine(model)
        elif self.is_nemo:
            with tempfile.TemporaryDirectory() as place:
                model = self._megatron()
                convert.save_folder(model, model.hf_config, Path(place) / "hf")
                yield model.hf_config, TransformersEngine(Path(place) / "hf")
        else:
            yield read_config(self.folder), TransformersEngine(self.folder)

    def _megatron(self) -> nemotron_h.NemotronH:
        if self.is_nemo:
            from nemo_cascade.models.cascade_model import CascadeModel

            return CascadeModel.restore_from(str(self.folder)).model
        layout = parallel.ParallelLayout()
        if not parallel.is_started():
            parallel.start(layout)
        model = nemotron_h.build(read_config(self.folder), layout)
        convert.load_folder(model, self.folder)
        return model


@dataclass(frozen=True)
class Prompts:
    """What both sides read: `count` sequences of at most `longest` tokens, drawn with `seed`, or the paragraphs of a
    `text` file.
    """

    count: int = 16
    longest: int = 256
    seed: int = 0
    text: Path | None = None

    def token_ids(self, tokenizer: ChatTokenizer) -> list[list[int]]:
        """The sequences as tokens, none empty."""
        ids = self._paragraphs(tokenizer) if self.text else self._conversations(tokenizer)
        return [sequence[: self.longest] for sequence in ids if sequence]

    def _paragraphs(self, tokenizer: ChatTokenizer) -> list[list[int]]:
        assert self.text is not None
        try:
            text = self.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {self.text}: cannot be read as text ({error})") from error
        paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
        if not paragraphs:
            raise UserError(f"--text {self.text}: no text in it")
        return [tokenizer.encode_text(part) for part in paragraphs[: self.count]]

    def _conversations(self, tokenizer: ChatTokenizer) -> list[list[int]]:
        """Demonstrated train tasks of the nano curriculum, the domains in turn, in both modes of thinking."""
        rng = random.Random(self.seed)
        services = Services()
        sequences = []
        try:
            domains = {name: load(name, services) for name in available()}
            for index, name in zip(range(self.count), itertools.cycle(domains), strict=False):
                (task,) = domains[name].tasks("train", 1, rng.getrandbits(48))
                moded = dataclasses.replace(task, thinking=index % 2 == 0)
                messages = domains[name].demonstrate(moded, rng.getrandbits(32))
                sequences.append(tokenizer.encode_conversation(moded, messages)[0])
        finally:
            services.close()
        return sequences


@dataclass(frozen=True)
class Comparison:
    """The sides, what they read, and how far apart they are. `notes`: what one should know to read the numbers."""

    a: Side
    b: Side
    sequences: int
    parity: Parity
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Everything, for programs."""
        sides = {side.label.lower(): {"path": str(side.folder), "engine": side.engine} for side in (self.a, self.b)}
        return {**sides, "sequences": self.sequences, **self.parity.to_json(), "notes": list(self.notes)}

    def table(self) -> str:
        """The comparison for a terminal."""
        positions = len(next(iter(self.parity.modes.values())).positions)
        head = [f"{side.label}  {side.folder} in {side.engine}" for side in (self.a, self.b)]
        head.append(f"{self.sequences} sequences, {positions} tokens, packed and one by one")
        return "\n".join([*head, "", self.parity.table(), *(f"note: {note}" for note in self.notes)])


def compare(
    a: str, b: str, engines: tuple[str | None, str | None], prompts: Prompts, tolerance: float = 1e-4
) -> Comparison:
    """Run both sides on the same tokens. An engine that is None is Megatron's, but transformers' for B where both
    sides are the same checkpoint: comparing a model with itself says nothing.
    """
    first = Side.of("A", a, engines[0] or MEGATRON)
    second = Side.of("B", b, engines[1] or MEGATRON)
    if engines[1] is None and first.folder.resolve() == second.folder.resolve():
        second = dataclasses.replace(second, engine=TRANSFORMERS if first.engine == MEGATRON else MEGATRON)
    if not 0.0 < tolerance < float("inf"):
        raise UserError(f"--tolerance {tolerance}: a positive number is needed")
    if prompts.count < 1 or prompts.longest < 1:
        raise UserError("--prompts and --max-tokens must be at least 1")
    _check_early(first, second)
    parity, sequences, notes = _run(first, second, prompts, tolerance)
    return Comparison(first, second, len(sequences), parity, tuple([*notes, *_notes(first, second)]))


def _run(
    first: Side, second: Side, prompts: Prompts, tolerance: float
) -> tuple[Parity, Sequence[torch.Tensor], list[str]]:
    with first.open() as (config, engine):
        # Weights without a tokenizer are compared on the nano tokenizer's ids: any ids inside the vocabulary will do.
        named = [*_tokenizers(first, second), None]
        sequences = _tokens(ChatTokenizer(tokenizer_folder(named[0], config.vocab_size)), prompts, config)
        traces = {name: engine.trace(sequences, packed) for name, packed in MODES.items()}
        ours = _prints(engine)
        del engine
    gc.collect()
    modes: dict[str, Difference] = {}
    with second.open() as (other, engine):
        notes = _check_same(config, other)
        for name, packed in MODES.items():
            free, alone = engine.trace(sequences, packed), engine.trace(sequences, packed, feed=traces[name])
            modes[name] = difference(traces[name], free, alone, points(config))
        theirs = _prints(engine)
    tensors = None if ours is None or theirs is None else tuple(tensor_differences(ours, theirs))
    return Parity(modes, tolerance, tensors), sequences, notes


def _prints(engine: Engine) -> Prints | None:
    """What identifies each tensor, where the model is ours."""
    return tensor_prints(engine.model) if isinstance(engine, MegatronEngine) else None


def _tokens(tokenizer: ChatTokenizer, prompts: Prompts, config: NemotronHConfig) -> list[torch.Tensor]:
    """The sequences as tensors that the model can embed."""
    ids = prompts.token_ids(tokenizer)
    if (largest := max(map(max, ids))) >= config.vocab_size:
        raise UserError(
            f"{tokenizer.folder}: token {largest} lies outside the model's vocabulary of {config.vocab_size}; "
            "the checkpoint needs its own tokenizer.json beside it"
        )
    return [torch.tensor(sequence) for sequence in ids]


def _check_early(first: Side, second: Side) -> None:
    """Refuse what can be seen from two config.json before any weight is read."""
    if not first.is_nemo and not second.is_nemo:
        _check_same(read_config(first.folder), read_config(second.folder))


def _check_same(ours: NemotronHConfig, theirs: NemotronHConfig) -> list[str]:
    """Refuse other architectures, naming each field; what only changes the computation is returned as notes."""
    a, b = dataclasses.asdict(ours), dataclasses.asdict(theirs)
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"A has a vocabulary of {ours.vocab_size} tokens and B of {theirs.vocab_size}: their log-probabilities "
            "cannot be compared; give two checkpoints of one model"
        )
    differ = [key for key in a if a[key] != b[key] and key not in IDLE]
    if fatal := [f"{key} {a[key]} and {b[key]}" for key in differ if key not in COMPUTED]:
        raise UserError(f"A and B are different architectures: {', '.join(fatal)}; give two checkpoints of one model")
    return [f"config.json differs: {key} is {a[key]} in A and {b[key]} in B" for key in differ]


def _tokenizers(*sides: Side) -> list[Path]:
    """The folders that carry a tokenizer."""
    return [side.folder for side in sides if (side.folder / "tokenizer.json").is_file()]


def _notes(*sides: Side) -> list[str]:
    """What makes two engines differ although no weight does."""
    notes = []
    for side in sides:
        if side.engine == TRANSFORMERS and not side.is_nemo:
            bound = read_json(side.folder / "config.json").get("time_step_min", 0.001)
            if isinstance(bound, float | int) and bound > NO_CLAMP:
                notes.append(
                    f"{side.label}: config.json has time_step_min {bound}: transformers clamps the time step to it "
                    "when it reads a prompt, Megatron never does; `nemo-cascade convert` writes a folder without it"
                )
    if len({(folder / "tokenizer.json").read_bytes() for folder in _tokenizers(*sides)}) > 1:
        notes.append("tokenizer.json differs between A and B; both read the tokens of A's")
    return notes
