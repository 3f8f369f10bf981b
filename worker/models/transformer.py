"""The one transformer: decoder layers with RMSNorm, RoPE, grouped-query attention, gated FFN.

Tensor parallelism, Megatron style (arXiv:1909.08053): QKV and gate/up are column parallel, o and
down row parallel and each followed by an all-reduce; embedding (all-reduce) and LM head are
vocabulary parallel. Between all-reduces every rank holds the same residual stream.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tpcomm import Communicator
from worker.forward_batch import ForwardBatch
from worker.models.spec import ModelSpec
from worker.ops import Ops
from worker.rope import cos_sin_table
from worker.sharding import ShardSpec
from worker.weight_layout import LayerWeights, TransformerWeights


class LayerCaches(Protocol):
    """The paged KV cache, seen layer by layer."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(k, v), each [num_blocks, block_size, num_local_kv_heads, head_dim]."""
        ...


class Transformer:
    """One rank's part of a model. Holds no state between calls but weights and the RoPE table."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: ShardSpec,
        weights: TransformerWeights,
        comm: Communicator,
        ops: Ops,
        max_position: int,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.weights = weights
        self._comm = comm
        self._ops = ops
        self._scale = spec.head_dim**-0.5
        table = cos_sin_table(spec.rope, spec.head_dim, max_position)
        self._cos_sin = table.to(weights.embedding.device)
        columns = torch.arange(shard.padded_vocab, device=weights.embedding.device)
        self._is_padding = columns >= shard.num_local_vocab
        self._has_padding = shard.num_local_vocab < shard.padded_vocab

    def forward(self, batch: ForwardBatch, kv_cache: LayerCaches) -> Tensor:
        """Run one step and write its keys and values to the cache.

        Returns the hidden states after the final norm, [num_logit_rows, hidden_size] in the
        weights' dtype, equal on every rank: rows `batch.logit_rows`, or all tokens. Collective;
        every rank passes the same batch.
        """
        weights, ops, eps = self.weights, self._ops, self.spec.rms_norm_eps
        residual = self._embed(batch.token_ids)
        normed = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        last = len(weights.layers) - 1
        for index, layer in enumerate(weights.layers):
            attended = self._attend(normed, layer, batch, kv_cache.layer(index))
            if index == last and batch.logit_rows is not None:
                # What follows works on rows alone, and only these are asked for.
                attended = attended.index_select(0, batch.logit_rows)
                residual = residual.index_select(0, batch.logit_rows)
            partial = ops.linear(attended, layer.o, layer.o_bias)
            normed = self._sum_into(residual, partial, layer.post_attention_norm)
            partial = self._feed_forward(normed, layer)
            next_norm = (
                weights.final_norm if index == last else weights.layers[index + 1].input_norm
            )
            normed = self._sum_into(residual, partial, next_norm)
        return normed

    def local_logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits, [num_rows, padded_vocab] in the weights' dtype; columns without a
        token are -inf.

        Column i is token `vocab_start + i`. `hidden` is what `forward` returned.
        """
        logits = self._ops.linear(hidden, self.weights.lm_head, None)
        return logits.masked_fill_(self._is_padding, -torch.inf) if self._has_padding else logits

    def _embed(self, token_ids: Tensor) -> Tensor:
        """Every rank fills in the tokens of its vocabulary range; the sum has them all."""
        shard = self.shard
        rows = self._ops.embedding(
            token_ids, self.weights.embedding, shard.vocab_start, shard.num_local_vocab
        )
        return self._comm.all_reduce(rows)

    def _attend(
        self,
        normed: Tensor,
        layer: LayerWeights,
        batch: ForwardBatch,
        caches: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention of this rank's heads, before the output projection: [num_tokens, q_size]."""
        shard, spec = self.shard, self.spec
        q = self._ops.qk_norm_rope_store(
            self._ops.linear(normed, layer.qkv, layer.qkv_bias),
            layer.q_norm,
            layer.k_norm,
            spec.rms_norm_eps,
            self._cos_sin,
            batch.positions,
            batch.slot_mapping,
            *caches,
            shard.num_local_q_heads,
            shard.num_local_kv_heads,
            spec.head_dim,
        )
        num_decode_rows = batch.num_decode_rows
        parts = []
        if num_decode_rows:
            parts.append(self._decode(q[:num_decode_rows], batch, caches))
        if batch.chunks is not None:
            parts.append(
                self._ops.prefill_attention(
                    q[num_decode_rows:],
                    *caches,
                    batch.block_table,
                    batch.chunks,
                    self._scale,
                    shard.q_per_kv,
                    shard.q_offset,
                )
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return attended.flatten(1)

    def _decode(self, q: Tensor, batch: ForwardBatch, caches: tuple[Tensor, Tensor]) -> Tensor:
        return self._ops.decode_attention(
            q,
            *caches,
            batch.block_table,
            batch.decode_slots,
            batch.decode_lens,
            self._scale,
            self.shard.q_per_kv,
            self.shard.q_offset,
        )

    def _feed_forward(self, normed: Tensor, layer: LayerWeights) -> Tensor:
        """silu(gate) * up, projected down: this rank's part of the sum, [num_rows, hidden_size]."""
        gated = self._ops.gated_linear(normed, layer.gate_up, layer.gate_up_bias)
        return self._ops.linear(gated, layer.down, layer.down_bias)

    def _sum_into(self, residual: Tensor, partial: Tensor, norm: Tensor) -> Tensor:
        """Add the sum of all ranks' `partial` to `residual` IN PLACE; returns the norm of that."""
        eps, ops = self.spec.rms_norm_eps, self._ops
        return self._comm.all_reduce_add_rms_norm(partial, residual, norm, eps, ops.add_rms_norm)
