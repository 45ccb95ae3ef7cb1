"""Core attention: causal, grouped queries, no positions, packed rows. In PyTorch, or on one CPU thread in C."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right

from nemo_cascade.models.attention_native import attend, usable
from nemo_cascade.models.context import RowCut
from nemo_cascade.models.packed import PackedLayout, PackedRow, pack, unpack


class CoreAttention(MegatronModule):
    """softmax(q k^T / sqrt(head_dim)) v inside each sequence; NemotronH encodes no positions (the Mamba layers do)."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query [T, heads, width], key and value [T, KV heads, width] -> [T, heads * width].

        With context parallelism T counts the tokens of this rank.
        """
        assert isinstance(packed_seq_params, PackedRow)
        if packed_seq_params.cut is not None:
            return self._cut(query, key, value, packed_seq_params.cut)
        if usable(query, key, value):
            bounds = (0, *itertools.accumulate(packed_seq_params.lengths))
            return attend(query, key, value, bounds, self.scale)
        return self._in_blocks(query, key, value, packed_seq_params.layout)

    def _in_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        """With torch's scaled_dot_product_attention, on the row unpacked into padded blocks."""
        tokens, heads, width = query.shape
        groups = key.shape[1]
        parts = [part.reshape(tokens, -1) for part in (query, key, value)]
        if layout.identity:  # nothing to move
            blocks = [[unpack(part, layout)[0] for part in parts]]
        else:
            widths = [part.shape[1] for part in parts]
            blocks = [block.split(widths, dim=-1) for block in unpack(torch.cat(parts, dim=-1), layout)]
        outputs = []
        for q, k, v in blocks:
            S, L, _ = q.shape
            mixed = F.scaled_dot_product_attention(
                q.view(S, L, heads, width).transpose(1, 2),
                k.view(S, L, groups, width).transpose(1, 2),
                v.view(S, L, groups, width).transpose(1, 2),
                is_causal=True,
                scale=self.scale,
                enable_gqa=groups != heads,
            )
            outputs.append(mixed.transpose(1, 2).reshape(S, L, heads * width))
        return pack(outputs, layout)

    def _cut(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cut: RowCut) -> torch.Tensor:
        """Own queries against the keys and values of all ranks, sequence by sequence."""
        _, heads, width = query.shape
        groups = key.shape[1]
        keys_T, values_T = cut.whole(torch.cat([key, value], dim=1)).split(groups, dim=1)
        outputs = []
        for span in cut.spans:
            mixed = F.scaled_dot_product_attention(
                query[span.begin : span.end].transpose(0, 1).unsqueeze(0),
                keys_T[span.first : span.last].transpose(0, 1).unsqueeze(0),
                values_T[span.first : span.last].transpose(0, 1).unsqueeze(0),
                attn_mask=causal_lower_right(span.end - span.begin, span.last - span.first),
                scale=self.scale,
                enable_gqa=groups != heads,
            )
            outputs.append(mixed[0].transpose(0, 1).reshape(-1, heads * width))
        return torch.cat(outputs)
