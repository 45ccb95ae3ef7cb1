"""Training checkpoints in megatron-core's distributed format (torch_dist), complete or absent.

What is stored are whole tensors, each rank's part in its own file, so that a run cut over ranks in another way can go
on from them. Writing happens in this process: Megatron's writer starts a process that imports torch for its first
checkpoint and forks for every one, which costs seconds on a small model, and a forked writer outlives a killed rank.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.storage import WriteResult

from nemo_cascade.learner.folder import write_folder
from nemo_cascade.learner.ranks import fail_together
from nemo_cascade.learner.stored import REMEDY, check_files, check_names, read_index
from nemo_cascade.learner.training_state import TrainingState
from nemo_cascade.types import UserError

LOG = logging.getLogger(__name__)
FORMAT = 2  # 1 had one file per model-parallel part, for its layout only
META = "checkpoint.json"
COMMON = "common.pt"  # Megatron's name for what is not a sharded tensor
SLOWEST_WRITER = timedelta(minutes=30)  # between the first rank that has written its file and the last


@dataclasses.dataclass(frozen=True)
class RankPart:
    """What one rank tells the first: its file's plan, where each tensor lies in it, Adam's count, its random stream."""

    plan: SavePlan
    written: list[WriteResult]
    steps: int
    random: torch.Tensor


class CheckpointWriter:
    """Writes the checkpoints of a run. Every rank calls every method.

    With `asynchronous`, `save` copies what this rank writes to host memory and returns; a thread writes, waits for the
    other ranks and renames. A failure shows at the next `save` or `finish`. At most one checkpoint is on its way. The
    thread dies with the process, and then the checkpoint before it is the newest.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.pending: Future[None] | None = None
        # The training loop's collectives go on meanwhile, so the thread needs a group of its own.
        self.group = dist.new_group(backend="gloo", timeout=SLOWEST_WRITER) if asynchronous else None

    def save(self, folder: Path, state: TrainingState, meta: dict[str, Any]) -> None:
        """Write `state` and the readable `meta`; each tensor once, by one of the ranks that hold it."""
        self.finish()
        write = partial(_write, folder, _Part(state, copied=self.thread is not None), meta, self.group)
        if self.thread is None:
            write()
        else:
            self.pending = self.thread.submit(write)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk; raises what went wrong with it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()


class _Part:
    """This rank's share of a checkpoint, ready to be written without the help of other ranks."""

    def __init__(self, state: TrainingState, copied: bool) -> None:
        self.steps, self.random = state.steps, torch.get_rng_state()
        sharded, _ = save_preprocess(dict(state.sharded), validate_access_integrity=False)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        changing = state.memory() if copied else set()
        for entry in nested_values(by_key):
            if entry.data.untyped_storage().data_ptr() in changing:
                entry.data = entry.data.detach().to("cpu", copy=True)
        self.planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self.planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=dist.get_rank() == 0)
        self.plan = dataclasses.replace(
            self.planner.create_local_plan(), storage_data=_StoragePrefix(f"__{dist.get_rank()}_")
        )

    def write(self, aside: Path) -> RankPart:
        """One file; nothing where other ranks hold the same tensors and write them."""
        self.planner.finish_plan(self.plan)
        written = FileSystemWriter(aside).write_data(self.plan, self.planner).wait() if self.plan.items else []
        return RankPart(self.plan, written, self.steps, self.random)

    def complete(self, aside: Path, parts: list[RankPart], meta: dict[str, Any]) -> None:
        """The files that say what lies where. Raises ValueError where the parts do not make up every tensor."""
        _, metadata = self.planner.create_global_plan([part.plan for part in parts])
        FileSystemWriter(aside).finish(metadata, [part.written for part in parts])
        steps = max(part.steps for part in parts)
        _write_tensors(aside / COMMON, {"optimizer_steps": steps, "random": [part.random for part in parts]})
        _write_text(aside / META, json.dumps({"format": FORMAT, **meta}, indent=1))
        save_config(CheckpointingConfig("torch_dist", 1), str(aside))


def _write(folder: Path, part: _Part, meta: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    """The part of saving that runs in either thread."""
    try:
        write_folder(
            folder, "the training checkpoint", part.write,
            lambda aside, parts: part.complete(aside, parts, meta), group,
        )  # fmt: skip
    except UserError as error:
        LOG.error("%s", error)  # at once: where training goes on meanwhile it is raised a checkpoint later
        raise


def load(folder: Path, state: TrainingState, model: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's meta; fills the live tensors of `state` and sets the random stream.

    Files, names and shapes are checked before the first tensor is overwritten. UserError says which file cannot be used
    and why. On more ranks than the checkpoint was written by, random streams repeat.
    """
    meta = _read_meta(folder)
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{folder / META}: written in format {meta.get('format')}, this version reads format {FORMAT}; finish the "
            "stage with the version that wrote it, or delete the folder to start the stage afresh"
        )
    if meta["model"] != model:
        differing = sorted(key for key in meta["model"].keys() | model if meta["model"].get(key) != model.get(key))
        raise UserError(
            f"{folder / META}: the checkpoint is of another model than this run's ({', '.join(differing)}); start the "
            "stage afresh"
        )
    wanted = dict(state.sharded)
    apply_factories(wanted)
    index = read_index(folder)
    problem = check_names(folder, index, nested_values(wanted))
    fail_together(problem or check_files(folder, index, dist.get_rank(), dist.get_world_size()))
    common = _read_tensors(folder / COMMON)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls torch's reader by an older name
            loaded = dist_checkpointing.load(dict(state.sharded), str(folder), validate_access_integrity=False)
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise UserError(f"{folder}: the checkpoint cannot be read ({error}); {REMEDY}") from error
    state.take(loaded, common["optimizer_steps"])
    random_states = common["random"]
    torch.set_rng_state(random_states[dist.get_rank() % len(random_states)])
    return meta


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / META}: not a training checkpoint ({error})") from error
    return meta if isinstance(meta, dict) else {}


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_tensors(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; nothing in the file is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: the checkpoint cannot be read ({reason}); {REMEDY}") from error
    assert isinstance(content, dict)
    return content
