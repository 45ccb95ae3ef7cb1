"""The three mixers of NemotronH for decoding: Mamba-2, attention, mixture of experts. Each is `x + mixer(RMSNorm(x))`.

Every layer reads packed tokens [N, hidden] (`prefill`, no padding in token-wise work) or one token per row [B, hidden]
(`step`). What a row computes does not depend on the other rows of its batch: every product has at least `MIN_ROWS` rows
(below that BLAS sums in another order), and attention reads whole blocks of `BLOCK` positions.
Suffixes: N packed tokens, B rows, T padded positions, H heads, G groups, P head width, S state width, C convolution
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from nemo_cascade.models.config import NemotronHConfig
from nemo_cascade.models.decode_scan import chunked_scan

MIN_ROWS = 4
BLOCK = 32  # positions; prompts are padded and attention caches are read in multiples of it


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, in] @ weight [in, out], the same for a row alone and among others."""
    rows = x.shape[0]
    return x @ weight if rows >= MIN_ROWS else (F.pad(x, (0, 0, 0, MIN_ROWS - rows)) @ weight)[:rows]


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """From exp alone: torch.sigmoid rounds the last few elements of a tensor differently, so rows would depend on batch
    size.
    """
    return torch.reciprocal(torch.exp(-x) + 1.0)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(x); torch's own where rows fill its vector loop, so that no element falls into the loop's tail."""
    return F.silu(x) if x.shape[-1] % 32 == 0 else x * sigmoid(x)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) without overflow; built from operations that round every element alike, as `sigmoid`."""
    return torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0.0)


def blocks(length: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def move_rows(tensor: torch.Tensor, source: torch.Tensor, target: torch.Tensor, size: int) -> torch.Tensor:
    """Rows `source` copied over rows `target`; a view of the first `size` rows."""
    if len(source):
        tensor.index_copy_(0, target, tensor.index_select(0, source))
    return tensor[:size]


@dataclass(frozen=True)
class Rows:
    """Where the packed tokens of a batch sit in its right-padded grid [B, T]; T is `longest`, whole blocks."""

    lengths: list[int]
    longest: int
    grid_N: torch.Tensor  # int64: row * longest + position

    @classmethod
    def of(cls, lengths: list[int]) -> Rows:
        """The grid of sequences with these lengths."""
        longest = blocks(max(lengths))
        inside_BT = torch.arange(longest) < torch.tensor(lengths)[:, None]
        return cls(lengths, longest, inside_BT.reshape(-1).nonzero().squeeze(1))

    def pad(self, packed_N: torch.Tensor, before: int = 0) -> torch.Tensor:
        """[N, ...] to [B, before + T, ...], zeros in the padding and in the `before` first positions."""
        rest, rows, length = packed_N.shape[1:], len(self.lengths), before + self.longest
        grid = packed_N.new_zeros(rows * length, *rest)
        place_N = self.grid_N + before * (self.grid_N // self.longest + 1) if before else self.grid_N
        grid.index_copy_(0, place_N, packed_N)
        return grid.view(rows, length, *rest)

    def pack(self, grid_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] back to [N, ...]."""
        return grid_BT.flatten(0, 1).index_select(0, self.grid_N)


class LayerState(Protocol):
    """What one layer remembers of a batch."""

    def keep(self, index: torch.Tensor) -> LayerState:
        """The state of these rows."""

    def move(self, source: torch.Tensor, target: torch.Tensor, size: int) -> None:
        """Copy rows `source` over rows `target`, then keep the first `size` rows."""

    def join(self, others: Sequence[LayerState]) -> LayerState:
        """The rows of `others` below these."""


Noted = list[torch.Tensor] | None
"""Where a layer of experts appends its choice, uint8 [tokens, top-k], when somebody asks."""


class Layer(Protocol):
    """One residual block."""

    def prefill(self, x_N: torch.Tensor, rows: Rows, room: int, noted: Noted = None) -> tuple[torch.Tensor, LayerState]:
        """Read whole prompts."""

    def step(self, x_B: torch.Tensor, state: LayerState, lengths: list[int], noted: Noted = None) -> torch.Tensor:
        """Read one token per row; `lengths` are the tokens read before."""


@dataclass
class NoState:
    """Experts remember nothing."""

    def keep(self, index: torch.Tensor) -> NoState:
        return self

    def move(self, source: torch.Tensor, target: torch.Tensor, size: int) -> None:
        pass

    def join(self, others: Sequence[LayerState]) -> NoState:
        return self


@dataclass
class MambaState:
    """The last k-1 inputs of the convolution, oldest first, and the SSM state."""

    window: list[torch.Tensor]  # k-1 of [B, C]
    ssm: torch.Tensor  # [B, G, H/G, P, S]

    def keep(self, index: torch.Tensor) -> MambaState:
        return MambaState([part.index_select(0, index) for part in self.window], self.ssm.index_select(0, index))

    def move(self, source: torch.Tensor, target: torch.Tensor, size: int) -> None:
        self.window = [move_rows(part, source, target, size) for part in self.window]
        self.ssm = move_rows(self.ssm, source, target, size)

    def join(self, others: Sequence[LayerState]) -> MambaState:
        parts = [self, *(other for other in others if isinstance(other, MambaState))]
        window = [torch.cat(column) for column in zip(*(part.window for part in parts), strict=True)]
        return MambaState(window, torch.cat([part.ssm for part in parts]))


class MambaLayer:
    """Mamba-2: in-projection, causal depthwise convolution, selective state space, gated RMSNorm (gate first),
    out-projection.
    """

    def __init__(self, config: NemotronHConfig, own: Mapping[str, torch.Tensor]) -> None:
        self.eps = config.layer_norm_epsilon
        self.heads, self.width = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state = config.n_groups, config.ssm_state_size
        self.inner = self.heads * self.width
        self.channels = self.inner + 2 * self.groups * self.state
        self.chunk = config.chunk_size
        self.norm = own["norm.weight"].clone()
        self.in_proj = own["mixer.in_proj.weight"].t().contiguous()
        self.taps = [tap.clone() for tap in own["mixer.conv1d.weight"].squeeze(1).unbind(1)]  # k of [C], oldest first
        self.conv_bias = own["mixer.conv1d.bias"].clone()
        self.dt_bias = own["mixer.dt_bias"].clone()
        self.decay = -torch.exp(own["mixer.A_log"])  # A, negative
        self.skip = own["mixer.D"].clone()[:, None]
        # The norm's weight scales the columns that out_proj reads, so it is multiplied in once.
        self.out_proj = (own["mixer.out_proj.weight"] * own["mixer.norm.weight"]).t().contiguous()

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        gate, mixed, dt = project(normed, self.in_proj).split([self.inner, self.channels, self.heads], dim=-1)
        return gate, mixed, softplus(dt + self.dt_bias)

    def _finish(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        gated = silu(gate).mul_(y).view(-1, self.groups, self.inner // self.groups)
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps)
        return x + project(normed.view(-1, self.inner), self.out_proj)

    def prefill(self, x_N: torch.Tensor, rows: Rows, room: int, noted: Noted = None) -> tuple[torch.Tensor, MambaState]:
        gate_N, mixed_N, dt_N = self._project(x_N)
        past = len(self.taps) - 1
        padded = rows.pad(mixed_N, before=past)  # [B, k-1+T, C]
        conv = self.conv_bias.expand(len(rows.lengths), rows.longest, -1).clone()
        for offset, tap in enumerate(self.taps):
            conv.addcmul_(padded[:, offset : offset + rows.longest], tap)
        x, b, c = silu(conv).split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        heads = (self.groups, self.heads // self.groups)
        x = x.unflatten(-1, (*heads, self.width))
        b, c = (part.unflatten(-1, (self.groups, self.state)) for part in (b, c))
        dt = rows.pad(dt_N).unflatten(-1, heads)
        y, ssm = chunked_scan(x, dt, self.decay.view(heads), b, c, self.chunk)
        y_N = rows.pack(torch.addcmul(y, x, self.skip.view(*heads, 1))).flatten(1)
        each = torch.arange(len(rows.lengths))
        lengths = torch.tensor(rows.lengths)
        window = [padded[each, lengths + offset] for offset in range(past)]
        return self._finish(x_N, y_N, gate_N), MambaState(window, ssm)

    def step(self, x_B: torch.Tensor, state: LayerState, lengths: list[int], noted: Noted = None) -> torch.Tensor:
        assert isinstance(state, MambaState)
        rows, per_group = len(lengths), self.heads // self.groups
        gate, mixed, dt = self._project(x_B)
        conv = torch.addcmul(self.conv_bias, mixed, self.taps[-1])
        for past, tap in zip(state.window, self.taps[:-1], strict=True):
            conv.addcmul_(past, tap)
        state.window = [*state.window[1:], mixed]
        x, b, c = silu(conv).split([self.inner, self.groups * self.state, self.groups * self.state], dim=-1)
        heads = x.view(rows, self.heads, self.width)
        input_ = (heads * dt.unsqueeze(-1)).view(rows, self.groups, per_group, self.width, 1)
        state.ssm.mul_(torch.exp(dt * self.decay).view(rows, self.groups, per_group, 1, 1))
        state.ssm.addcmul_(input_, b.view(rows, self.groups, 1, 1, self.state))
        y = (state.ssm * c.view(rows, self.groups, 1, 1, self.state)).sum(-1).view(rows, self.heads, self.width)
        return self._finish(x_B, y.addcmul_(heads, self.skip).view(rows, self.inner), gate)


@dataclass
class AttentionState:
    """Keys and values [B, KV heads, room, D], and the additive mask [B, KV heads, 1, room]: 0 on what is read, -inf
    beyond.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor

    def keep(self, index: torch.Tensor) -> AttentionState:
        return AttentionState(*(part.index_select(0, index) for part in (self.keys, self.values, self.mask)))

    def move(self, source: torch.Tensor, target: torch.Tensor, size: int) -> None:
        self.keys = move_rows(self.keys, source, target, size)
        self.values = move_rows(self.values, source, target, size)
        self.mask = move_rows(self.mask, source, target, size)

    def join(self, others: Sequence[LayerState]) -> AttentionState:
        parts = [self, *(other for other in others if isinstance(other, AttentionState))]
        room = max(part.keys.shape[2] for part in parts)
        for part in parts:
            part.grow(room)
        return AttentionState(
            torch.cat([part.keys for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.cat([part.mask for part in parts]),
        )

    def grow(self, room: int) -> None:
        """Make place for `room` tokens per row."""
        more = room - self.keys.shape[2]
        if more > 0:
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))
            self.mask = F.pad(self.mask, (0, more), value=float("-inf"))


class AttentionLayer:
    """Grouped-query attention without positions; scale head_dim^-0.5."""

    def __init__(self, config: NemotronHConfig, own: Mapping[str, torch.Tensor]) -> None:
        self.eps = config.layer_norm_epsilon
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.norm = own["norm.weight"].clone()
        self.qkv = torch.cat([own[f"mixer.{name}_proj.weight"] for name in "qkv"]).t().contiguous()
        self.o_proj = own["mixer.o_proj.weight"].t().contiguous()

    def _project(self, x: torch.Tensor) -> list[torch.Tensor]:
        normed = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        heads = project(normed, self.qkv).unflatten(-1, (self.heads + 2 * self.kv_heads, self.width))
        return list(heads.split([self.heads, self.kv_heads, self.kv_heads], dim=-2))

    def prefill(
        self, x_N: torch.Tensor, rows: Rows, room: int, noted: Noted = None
    ) -> tuple[torch.Tensor, AttentionState]:
        q, k, v = (rows.pad(part).transpose(1, 2) for part in self._project(x_N))  # [B, heads, T, D]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        position = torch.arange(rows.longest) >= torch.tensor(rows.lengths)[:, None]
        mask = torch.zeros(position.shape).masked_fill_(position, float("-inf"))
        mask = mask[:, None, None, :].repeat(1, self.kv_heads, 1, 1)
        state = AttentionState(k.contiguous(), v.contiguous(), mask)
        state.grow(rows.longest + room)
        out_N = rows.pack(out.transpose(1, 2)).flatten(1)
        return x_N + project(out_N, self.o_proj), state

    def step(self, x_B: torch.Tensor, state: LayerState, lengths: list[int], noted: Noted = None) -> torch.Tensor:
        assert isinstance(state, AttentionState)
        rows, read = len(lengths), blocks(max(lengths) + 1)
        if read > state.keys.shape[2]:
            state.grow(2 * read)
        room, each = state.keys.shape[2], rows * self.kv_heads
        q, k, v = self._project(x_B)
        place = torch.tensor(lengths).repeat_interleave(self.kv_heads) + torch.arange(each) * room
        state.keys.view(each * room, self.width).index_copy_(0, place, k.reshape(each, self.width))
        state.values.view(each * room, self.width).index_copy_(0, place, v.reshape(each, self.width))
        state.mask.view(each * room).index_fill_(0, place, 0.0)
        queries = q.reshape(each, self.heads // self.kv_heads, self.width)
        keys = state.keys.view(each, room, self.width)[:, :read].transpose(1, 2)
        mask = state.mask.view(each, 1, room)[:, :, :read]
        scores = torch.baddbmm(mask, queries, keys, alpha=self.width**-0.5)
        out = torch.bmm(torch.softmax(scores, -1), state.values.view(each, room, self.width)[:, :read])
        return x_B + project(out.view(rows, self.heads * self.width), self.o_proj)


class MoeLayer:
    """Sigmoid-routed experts with squared ReLU, plus the shared expert.

    Chosen by score + correction bias, weighed by the score itself, normalised over the chosen and scaled.
    """

    def __init__(self, config: NemotronHConfig, own: Mapping[str, torch.Tensor]) -> None:
        self.eps = config.layer_norm_epsilon
        self.experts, self.chosen = config.n_routed_experts, config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.norm = own["norm.weight"].clone()
        # At least 16 columns: BLAS sums a narrower product in an order that depends on the row's place.
        self.gate = F.pad(own["mixer.gate.weight"], (0, 0, 0, -self.experts % 16)).t().contiguous()
        self.bias = own["mixer.gate.e_score_correction_bias"].clone()
        self.shared_up = own["mixer.shared_experts.up_proj.weight"].t().contiguous()
        self.shared_down = own["mixer.shared_experts.down_proj.weight"].t().contiguous()
        each = range(self.experts)
        self.up = torch.stack([own[f"mixer.experts.{k}.up_proj.weight"].t() for k in each]).contiguous()
        self.down = torch.stack([own[f"mixer.experts.{k}.down_proj.weight"].t() for k in each]).contiguous()

    def _route(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = sigmoid(project(normed, self.gate)[:, : self.experts])
        chosen = torch.topk(scores + self.bias, self.chosen, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return chosen, weights * (self.scale / (weights.sum(-1, keepdim=True) + 1e-20))

    def _mix(self, x: torch.Tensor, noted: Noted) -> torch.Tensor:
        """Tokens sorted by expert, one product per expert that anyone chose: a top-2 of 8 does a quarter of the dense
        work.
        """
        normed = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
        chosen, weights = self._route(normed)
        if noted is not None:
            noted.append(chosen.to(torch.uint8))
        flat = chosen.view(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.experts).tolist()
        token = order // self.chosen
        # A few spare rows at the end, so that an expert with one token still gets a product of MIN_ROWS rows.
        sorted_in = F.pad(normed.index_select(0, token), (0, 0, 0, MIN_ROWS))
        parts: list[torch.Tensor] = []
        start = 0
        for expert, count in enumerate(counts):
            if count:
                inside = torch.relu_(sorted_in[start : start + max(count, MIN_ROWS)] @ self.up[expert])
                parts.append((inside.mul_(inside) @ self.down[expert])[:count])
                start += count
        routed = torch.cat(parts).mul_(weights.view(-1).index_select(0, order).unsqueeze(1))
        shared = torch.relu_(project(normed, self.shared_up))
        mixed = project(shared.mul_(shared), self.shared_down).index_add_(0, token, routed)
        return mixed.add_(x)

    def prefill(self, x_N: torch.Tensor, rows: Rows, room: int, noted: Noted = None) -> tuple[torch.Tensor, NoState]:
        return self._mix(x_N, noted), NoState()

    def step(self, x_B: torch.Tensor, state: LayerState, lengths: Sequence[int], noted: Noted = None) -> torch.Tensor:
        return self._mix(x_B, noted)
