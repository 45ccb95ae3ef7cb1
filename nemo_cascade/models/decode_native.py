"""The decoding step in C (`decode_step.c`), compiled on first use: the same numbers as `decode.py` to 1e-5, several
times faster on one core.

A nano model's step is many small operations, and most of the time of plain PyTorch goes into starting them. Here a step
is one call, and prompts are read by steps too. Without a C compiler, or with NEMO_CASCADE_NATIVE=0, `decode.py` does
the work; which of the two runs is logged once.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode import Cache, DecodeModel, check_weights, compaction
from nemo_cascade.models.native import compiled

SOURCE = Path(__file__).with_name("decode_step.c")
ROWS, COLS, SLOTS = 4, 32, 12  # as in the C file
PREFILL_ROWS = 128  # prompts read side by side
ROOM = 32  # attention positions are allocated in multiples of this


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "hidden", "vocab", "num_layers", "heads", "kv_heads", "head_dim", "mamba_heads", "mamba_width", "groups",
            "state", "taps", "experts", "chosen", "expert_width", "shared_width",
        )),
        ("eps", ctypes.c_float),
        ("routed_scale", ctypes.c_float),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("fixed", ctypes.c_void_p),
        ("fixed_stride", ctypes.c_int64),
        ("kv", ctypes.c_void_p),
        ("kv_stride", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None where it cannot be had; says once which it is."""
    loaded = compiled(SOURCE, "decoding")
    if loaded is not None:
        loaded.scratch_size.restype = ctypes.c_int64
    return loaded


@dataclass
class NativeCache:
    """What decoding remembers of a batch: `fixed` [B, F] holds convolution windows and SSM states, `kv`
    [B, attention layers, room, 2 * KV width] keys and values.
    """

    lengths: list[int]
    fixed: torch.Tensor
    kv: torch.Tensor
    scratch: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # kept between steps, holds nothing

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows in this order; a row may be named more than once."""
        index = torch.tensor(rows, dtype=torch.int64)
        self.lengths = [self.lengths[row] for row in rows]
        self.fixed, self.kv = self.fixed.index_select(0, index), self.kv.index_select(0, index)

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove rows by moving the last ones into the holes; returns for each new row the old one."""
        order, holes, movers = compaction(len(self.lengths), rows)
        size = len(order)
        for hole, mover in zip(holes, movers, strict=True):
            self.fixed[hole], self.kv[hole] = self.fixed[mover], self.kv[mover]
        self.fixed, self.kv = self.fixed[:size], self.kv[:size]
        self.lengths = [self.lengths[row] for row in order]
        return order

    @classmethod
    def join(cls, caches: Sequence[NativeCache]) -> NativeCache:
        """The rows of several caches, in order."""
        room = max(cache.kv.shape[2] for cache in caches)
        for cache in caches:
            cache.grow(room)
        lengths = [length for cache in caches for length in cache.lengths]
        return cls(lengths, torch.cat([cache.fixed for cache in caches]), torch.cat([cache.kv for cache in caches]))

    def grow(self, room: int) -> None:
        """Make place for `room` tokens per row."""
        more = room - self.kv.shape[2]
        if more > 0:
            self.kv = F.pad(self.kv, (0, 0, 0, more))


class NativeModel:
    """`DecodeModel` behind the C step: the same `prefill` and `step`, with its own cache."""

    def __init__(self, config: NemotronHConfig, named: Mapping[str, torch.Tensor], loaded: ctypes.CDLL) -> None:
        check_weights(config, named)
        self.config, self._loaded = config, loaded
        self._struct = _Config(
            config.hidden_size, config.vocab_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.mamba_num_heads, config.mamba_head_dim, config.n_groups,
            config.ssm_state_size, config.conv_kernel, config.n_routed_experts, config.num_experts_per_tok,
            config.moe_intermediate_size, config.moe_shared_expert_intermediate_size, config.layer_norm_epsilon,
            config.routed_scaling_factor,
        )  # fmt: skip
        self._kinds = config.hybrid_override_pattern.encode()
        self._weights, self._offsets, self._norm, self._head = _blob(config, named)
        self._embeddings = named["backbone.embeddings.weight"].detach().to(torch.float32).contiguous()
        window = (config.conv_kernel - 1) * config.conv_channels
        self._fixed_size = len(config.layers("M")) * (window + config.mamba_inner * config.ssm_state_size)
        self._kv_shape = (len(config.layers("*")), 2 * config.num_key_value_heads * config.head_dim)
        self._chosen = len(config.layers("E")) * config.num_experts_per_tok

    def prefill(
        self, prompts: Sequence[Sequence[int]], room: int = 0, experts: list[bytes] | None = None
    ) -> tuple[torch.Tensor, NativeCache]:
        """Read prompts of any lengths; logits [B, V] after each one's last token, and the cache to decode from.

        `experts` gets for each prompt the experts that its tokens used, uint8 [tokens, MoE layers, top-k].
        """
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("prefill: every prompt needs at least one token")
        lengths = [len(prompt) for prompt in prompts]
        layers, width = self._kv_shape
        cache = NativeCache(
            lengths,
            torch.zeros(len(prompts), self._fixed_size),
            torch.zeros(len(prompts), layers, _rounded(max(lengths) + room), width),
        )
        last_BH = torch.empty(len(prompts), self.config.hidden_size)
        found = [b""] * len(prompts)
        longest_first = sorted(range(len(prompts)), key=lambda row: -lengths[row])
        for start in range(0, len(prompts), PREFILL_ROWS):
            rows = longest_first[start : start + PREFILL_ROWS]
            index = torch.tensor(rows)
            tokens = torch.zeros(len(rows), lengths[rows[0]], dtype=torch.int64)
            for place, row in enumerate(rows):
                tokens[place, : lengths[row]] = torch.tensor(prompts[row])
            active = len(rows)
            shape = (tokens.shape[1], len(rows), self._chosen)
            noted = None if experts is None else torch.empty(shape, dtype=torch.uint8)
            for at in range(lengths[rows[0]]):
                while lengths[rows[active - 1]] <= at:
                    active -= 1
                read = torch.full((active,), at, dtype=torch.int64)
                used = None if noted is None else noted[at]
                hidden = self._advance(tokens[:active, at], cache, index[:active], read, used)
                ended = [place for place in range(active) if lengths[rows[place]] == at + 1]
                if ended:
                    last_BH[index[ended]] = hidden[ended]
            if noted is not None:
                for place, row in enumerate(rows):
                    found[row] = noted[: lengths[row], place].numpy().tobytes()
        if experts is not None:
            experts += found
        return self._logits(last_BH), cache

    def step(self, tokens_B: torch.Tensor, cache: NativeCache, experts: list[bytes] | None = None) -> torch.Tensor:
        """Feed one token per row; logits [B, V] of the next one. Updates the cache in place.

        `experts` gets for each row those that this token used, uint8 [MoE layers, top-k].
        """
        if max(cache.lengths) >= cache.kv.shape[2]:
            cache.grow(_rounded(2 * max(cache.lengths)))
        rows = len(cache.lengths)
        used = None if experts is None else torch.empty(rows, self._chosen, dtype=torch.uint8)
        hidden = self._advance(tokens_B, cache, torch.arange(rows), torch.tensor(cache.lengths), used)
        if experts is not None and used is not None:
            experts += [own.tobytes() for own in used.numpy()]
        cache.lengths = [length + 1 for length in cache.lengths]
        return self._logits(hidden)

    def _advance(
        self,
        tokens: torch.Tensor,
        cache: NativeCache,
        index: torch.Tensor,
        lengths: torch.Tensor,
        used: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [rows, hidden] after one token each; `used` [rows, MoE layers * top-k] is filled when given."""
        rows = len(tokens)
        hidden = torch.zeros(-(-rows // ROWS) * ROWS, self.config.hidden_size)
        torch.index_select(self._embeddings, 0, tokens, out=hidden[:rows])
        needed = self._loaded.scratch_size(ctypes.byref(self._struct), _long(rows), _long(cache.kv.shape[2]))
        if len(cache.scratch) < needed:
            cache.scratch = torch.empty(needed)
        batch = _Batch(
            rows, index.data_ptr(), lengths.data_ptr(), cache.fixed.data_ptr(), cache.fixed.stride(0),
            cache.kv.data_ptr(), cache.kv.stride(0), cache.kv.shape[2], cache.scratch.data_ptr(),
            None if used is None else used.data_ptr(),
        )  # fmt: skip
        self._loaded.step(
            ctypes.byref(self._struct),
            self._kinds,
            _pointer(self._weights),
            _pointer(self._offsets),
            ctypes.byref(batch),
            _pointer(hidden),
        )
        return hidden[:rows]

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        rows, up = len(hidden_BH), -(-len(hidden_BH) // ROWS) * ROWS
        padded = F.pad(hidden_BH, (0, 0, 0, up - rows)).contiguous()
        width = -(-self.config.vocab_size // COLS) * COLS
        out, scratch = torch.empty(up, width), torch.empty_like(padded)
        self._loaded.logits(
            ctypes.byref(self._struct), _pointer(self._weights), _long(self._norm), _long(self._head), _long(rows),
            _pointer(padded), _pointer(scratch), _pointer(out),
        )  # fmt: skip
        return out[:rows, : self.config.vocab_size]


AnyModel = DecodeModel | NativeModel
AnyCache = Cache | NativeCache


def decode_model(config: NemotronHConfig, named: Mapping[str, torch.Tensor]) -> AnyModel:
    """The fastest model this machine can run."""
    loaded = library()
    return DecodeModel(config, named) if loaded is None else NativeModel(config, named, loaded)


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _rounded(length: int) -> int:
    return math.ceil(length / ROOM) * ROOM


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] as the C code reads it: [out / COLS, in, COLS], zero columns at the end."""
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % COLS))
    return padded.view(-1, COLS, weight.shape[1]).transpose(1, 2).reshape(-1)


def _blob(config: NemotronHConfig, named: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """All weights in one stretch, and where each part begins: [layers, SLOTS], the final norm, the head."""
    parts: list[torch.Tensor] = []
    size = 0

    def put(part: torch.Tensor) -> int:
        nonlocal size
        flat = part.detach().to(torch.float32).reshape(-1)
        flat = F.pad(flat, (0, -len(flat) % 16))
        parts.append(flat)
        size += len(flat)
        return size - len(flat)

    offsets = torch.zeros(config.num_hidden_layers, SLOTS, dtype=torch.int64)
    for layer, kind in enumerate(config.hybrid_override_pattern):
        prefix = f"backbone.layers.{layer}."
        own = {
            name.removeprefix(prefix): tensor.detach().to(torch.float32)
            for name, tensor in named.items()
            if name.startswith(prefix)
        }
        slots = {"M": _mamba_parts, "*": _attention_parts, "E": _expert_parts}[kind](own, config)
        for slot, part in enumerate([own["norm.weight"], *slots]):
            offsets[layer, slot] = put(part)
    norm = put(named["backbone.norm_f.weight"])
    head = put(_panels(named["lm_head.weight"].detach().to(torch.float32)))
    return torch.cat(parts), offsets, norm, head


def _mamba_parts(own: Mapping[str, torch.Tensor], config: NemotronHConfig) -> list[torch.Tensor]:
    return [
        _panels(own["mixer.in_proj.weight"]),
        own["mixer.conv1d.weight"].squeeze(1).t(),
        own["mixer.conv1d.bias"],
        own["mixer.dt_bias"],
        -torch.exp(own["mixer.A_log"]),
        own["mixer.D"],
        _panels(own["mixer.out_proj.weight"] * own["mixer.norm.weight"]),
    ]


def _attention_parts(own: Mapping[str, torch.Tensor], config: NemotronHConfig) -> list[torch.Tensor]:
    qkv = torch.cat([own[f"mixer.{name}_proj.weight"] for name in "qkv"])
    unused = [torch.zeros(0)] * 5
    return [_panels(qkv), *unused, _panels(own["mixer.o_proj.weight"])]


def _expert_parts(own: Mapping[str, torch.Tensor], config: NemotronHConfig) -> list[torch.Tensor]:
    each = range(config.n_routed_experts)
    return [
        _panels(own["mixer.gate.weight"]),
        own["mixer.gate.e_score_correction_bias"],
        _panels(own["mixer.shared_experts.up_proj.weight"]),
        _panels(own["mixer.shared_experts.down_proj.weight"]),
        torch.cat([_panels(own[f"mixer.experts.{k}.up_proj.weight"]) for k in each]),
        torch.cat([_panels(own[f"mixer.experts.{k}.down_proj.weight"]) for k in each]),
    ]
