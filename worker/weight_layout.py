"""How this rank's weights are laid out in memory.

Fused as the layers use them: QKV is one matrix (query rows, then key, then value), gate and up
another (gate rows, then up). QKV and gate/up are split by rows (column parallel), o and down by
columns (row parallel), embedding and LM head by vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.models.spec import ModelSpec
from worker.sharding import ShardSpec


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Row-parallel biases are held by rank 0 alone, so that the sum has them once."""

    input_norm: Tensor  # [hidden_size]
    qkv: Tensor  # [(num_local_q_heads + 2 * num_local_kv_heads) * head_dim, hidden_size]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None
    o: Tensor  # [hidden_size, num_local_q_heads * head_dim]
    o_bias: Tensor | None  # [hidden_size]
    post_attention_norm: Tensor  # [hidden_size]
    gate_up: Tensor  # [2 * padded_ffn, hidden_size]; rows past num_local_ffn of each half are 0
    gate_up_bias: Tensor | None
    down: Tensor  # [hidden_size, padded_ffn]; columns past num_local_ffn are 0
    down_bias: Tensor | None  # [hidden_size]


@dataclass(frozen=True)
class TransformerWeights:
    """All weights of one rank. With tied embeddings `lm_head` is `embedding`, one storage."""

    embedding: Tensor  # [padded_vocab, hidden_size]; rows past num_local_vocab are 0
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden_size]
    lm_head: Tensor  # [padded_vocab, hidden_size]; rows past num_local_vocab are 0


def allocate_weights(
    spec: ModelSpec, shard: ShardSpec, dtype: torch.dtype, device: torch.device
) -> TransformerWeights:
    """Weights of the right shapes: padding zero, the rest not yet written."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    embedding = _with_padding(empty(shard.padded_vocab, spec.hidden_size), shard.num_local_vocab)
    lm_head = embedding
    if not spec.tie_embeddings:
        lm_head = _with_padding(empty(shard.padded_vocab, spec.hidden_size), shard.num_local_vocab)
    return TransformerWeights(
        embedding=embedding,
        layers=tuple(_allocate_layer(spec, shard, empty) for _ in range(spec.num_layers)),
        final_norm=empty(spec.hidden_size),
        lm_head=lm_head,
    )


def _allocate_layer(
    spec: ModelSpec, shard: ShardSpec, empty: Callable[..., Tensor]
) -> LayerWeights:
    hidden, ffn = spec.hidden_size, shard.padded_ffn
    q_size = shard.num_local_q_heads * spec.head_dim
    qkv_size = q_size + 2 * shard.num_local_kv_heads * spec.head_dim
    row_bias = shard.rank == 0  # row-parallel biases
    gate_up, down = empty(2 * ffn, hidden), empty(hidden, ffn)
    gate_up_bias = empty(2 * ffn) if spec.mlp_bias else None
    for half in (gate_up, gate_up_bias):
        if half is not None:
            _with_padding(half[:ffn], shard.num_local_ffn)
            _with_padding(half[ffn:], shard.num_local_ffn)
    down[:, shard.num_local_ffn :].zero_()
    return LayerWeights(
        input_norm=empty(hidden),
        qkv=empty(qkv_size, hidden),
        qkv_bias=empty(qkv_size) if spec.qkv_bias else None,
        q_norm=empty(spec.head_dim) if spec.qk_norm else None,
        k_norm=empty(spec.head_dim) if spec.qk_norm else None,
        o=empty(hidden, q_size),
        o_bias=empty(hidden) if spec.o_bias and row_bias else None,
        post_attention_norm=empty(hidden),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=empty(hidden) if spec.mlp_bias and row_bias else None,
    )


def _with_padding(rows: Tensor, num_real: int) -> Tensor:
    rows[num_real:].zero_()
    return rows
