"""What the kernel benchmark times: each kernel on a model's shapes, with the work it cannot avoid.

A case is a list of the same call on different inputs. Together they exceed the GPU's L2 cache where
a layer's inputs would come from memory (weights, KV cache), so that running them one after another
does not time the cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.norm_kernel import add_rms_norm_reference
from worker.forward_batch import PrefillChunks
from worker.kernels.embedding import embedding, embedding_reference
from worker.kernels.norm import add_rms_norm, rms_norm, rms_norm_reference
from worker.kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from worker.kernels.silu_mul import silu_mul, silu_mul_reference
from worker.linear_table import LinearTable, row_bucket
from worker.linear_timing import Matrix, graph_timer, measure, table_of
from worker.ops import cuda_ops

BLOCK_SIZE = 16
_PAST_L2_BYTES = 256 << 20
_MAX_COPIES = 32

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class LayerShape:
    """One rank's part of a layer."""

    model: str
    tp: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    qk_norm: bool

    @staticmethod
    def of_config(path: Path, tp: int) -> LayerShape:
        """From a config.json whose heads and sizes `tp` divides."""
        config = json.loads(path.read_text(encoding="utf-8"))
        return LayerShape(
            model=path.parent.name,
            tp=tp,
            hidden_size=config["hidden_size"],
            num_q_heads=config["num_attention_heads"] // tp,
            num_kv_heads=config["num_key_value_heads"] // tp,
            head_dim=config["head_dim"],
            ffn_size=config["intermediate_size"] // tp,
            vocab_size=config["vocab_size"] // tp,
            qk_norm=config["model_type"] == "qwen3",
        )


@dataclass(frozen=True)
class Work:
    """`calls` do the same work on different inputs; `peer_calls` are torch doing it, if it can."""

    case: str
    batch_size: int
    context: int
    calls: list[Call]
    peer_name: str
    peer_calls: list[Call]
    num_bytes: int
    num_flops: int = 0


@dataclass(frozen=True)
class CaseBuilder:
    shape: LayerShape
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def row_kernels(self, num_tokens: int) -> list[Work]:
        """Norms, activation, embedding and the QKV epilogue on `num_tokens` tokens."""
        return [
            self._norm(num_tokens),
            self._add_norm(num_tokens),
            self._silu_mul(num_tokens),
            self._embedding(num_tokens),
            self._qk_norm_rope_store(num_tokens),
        ]

    def linears(self, num_tokens: int) -> list[Work]:
        """The four matrices of a layer, gate_up also with its activation."""
        shape = self.shape
        num_heads = shape.num_q_heads + 2 * shape.num_kv_heads
        return [
            self._linear("qkv", num_tokens, num_heads * shape.head_dim, shape.hidden_size),
            self._linear("o", num_tokens, shape.hidden_size, shape.num_q_heads * shape.head_dim),
            self._linear("gate_up", num_tokens, 2 * shape.ffn_size, shape.hidden_size),
            self._linear("gated", num_tokens, 2 * shape.ffn_size, shape.hidden_size, is_gated=True),
            self._linear("down", num_tokens, shape.hidden_size, shape.ffn_size),
        ]

    def decode_attention(self, num_rows: int, context: int) -> Work:
        """`num_rows` sequences, all `context` tokens long."""
        shape = self.shape
        num_bytes = 2 * num_rows * context * shape.num_kv_heads * shape.head_dim * self._item_size
        num_layers = _num_copies(num_bytes, most=8)
        cache, table = self._cache(num_rows, context, num_layers)
        slots = torch.arange(num_rows, device=self.device)
        lens = torch.full((num_rows,), context, dtype=torch.int32, device=self.device)
        q = self._randn(num_rows, shape.num_q_heads, shape.head_dim)
        dense = self._randn(num_layers, 2, num_rows, shape.num_kv_heads, context, shape.head_dim)
        attend, tail = cuda_ops().decode_attention, self._attention_tail

        def call(layer: int) -> Call:
            k_cache, v_cache = cache[:, layer, 0], cache[:, layer, 1]
            return lambda: attend(q, k_cache, v_cache, table, slots, lens, *tail)

        def peer(layer: int) -> Call:
            k, v = dense[layer].unbind(0)
            return lambda: functional.scaled_dot_product_attention(
                q[:, :, None], k, v, scale=tail[0], enable_gqa=True
            )

        return Work(
            "decode_attention",
            num_rows,
            context,
            [call(layer) for layer in range(num_layers)],
            "torch SDPA, K and V contiguous",
            [peer(layer) for layer in range(num_layers)],
            num_bytes + 2 * q.nbytes,
            4 * num_rows * context * shape.num_q_heads * shape.head_dim,
        )

    def prefill_attention(self, num_chunks: int, start: int, length: int) -> Work:
        """`num_chunks` chunks of `length` tokens, each after `start` cached ones."""
        shape, context = self.shape, start + length
        cache, table = self._cache(num_chunks, context, num_layers=1)
        k_cache, v_cache = cache[:, 0, 0], cache[:, 0, 1]
        chunks = self._chunks(num_chunks, start, length)
        q = self._randn(num_chunks * length, shape.num_q_heads, shape.head_dim)
        dense = self._randn(2, num_chunks, shape.num_kv_heads, context, shape.head_dim)
        q_dense = q.view(num_chunks, length, shape.num_q_heads, -1).transpose(1, 2)
        attend, tail = cuda_ops().prefill_attention, self._attention_tail
        # Without a cached prefix only: torch's fast kernels take no other causal mask.
        peer_calls: list[Call] = [
            lambda: functional.scaled_dot_product_attention(
                q_dense, dense[0], dense[1], is_causal=True, scale=tail[0], enable_gqa=True
            )
        ]
        seen = num_chunks * (length * start + length * (length + 1) // 2)
        return Work(
            f"prefill_attention {num_chunks}x{length}",
            num_chunks * length,
            context,
            [lambda: attend(q, k_cache, v_cache, table, chunks, *tail)],
            "torch SDPA, K and V contiguous",
            [] if start else peer_calls,
            2 * q.nbytes + dense.nbytes,
            4 * seen * shape.num_q_heads * shape.head_dim,
        )

    @property
    def _item_size(self) -> int:
        return self.dtype.itemsize

    @property
    def _attention_tail(self) -> tuple[float, int, int]:
        q_per_kv = self.shape.num_q_heads // self.shape.num_kv_heads
        return self.shape.head_dim**-0.5, q_per_kv, 0

    def _norm(self, num_tokens: int) -> Work:
        x, weight = self._randn(num_tokens, self.shape.hidden_size), self._weight()
        return self._row_work(
            "rms_norm",
            num_tokens,
            lambda: rms_norm(x, weight, 1e-5),
            lambda: rms_norm_reference(x, weight, 1e-5),
            2 * x.nbytes + weight.nbytes,
        )

    def _add_norm(self, num_tokens: int) -> Work:
        x, weight = self._randn(num_tokens, self.shape.hidden_size), self._weight()
        residual = torch.zeros_like(x)
        return self._row_work(
            "add_rms_norm",
            num_tokens,
            lambda: add_rms_norm(x, residual, weight, 1e-5),
            lambda: add_rms_norm_reference(x, residual, weight, 1e-5),
            4 * x.nbytes + weight.nbytes,
        )

    def _silu_mul(self, num_tokens: int) -> Work:
        gate_up = self._randn(num_tokens, 2 * self.shape.ffn_size)
        return self._row_work(
            "silu_mul",
            num_tokens,
            lambda: silu_mul(gate_up),
            lambda: silu_mul_reference(gate_up),
            gate_up.nbytes * 3 // 2,
        )

    def _embedding(self, num_tokens: int) -> Work:
        vocab_size, hidden_size = self.shape.vocab_size, self.shape.hidden_size
        weight = self._randn(vocab_size, hidden_size)
        token_ids = torch.randint(0, vocab_size, (num_tokens,), device=self.device)
        return self._row_work(
            "embedding",
            num_tokens,
            lambda: embedding(token_ids, weight, 0, vocab_size),
            lambda: embedding_reference(token_ids, weight, 0, vocab_size),
            2 * num_tokens * hidden_size * self._item_size,
        )

    def _qk_norm_rope_store(self, num_tokens: int) -> Work:
        shape = self.shape
        sizes = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim)
        num_heads = shape.num_q_heads + 2 * shape.num_kv_heads
        qkv = self._randn(num_tokens, num_heads * shape.head_dim)
        weight = self._randn(shape.head_dim) if shape.qk_norm else None
        cos_sin = torch.ones(num_tokens, shape.head_dim, device=self.device)
        tokens = torch.arange(num_tokens, device=self.device)
        cache, _ = self._cache(1, num_tokens, num_layers=1)
        layer = (cache[:, 0, 0], cache[:, 0, 1])
        return self._row_work(
            "qk_norm_rope_store",
            num_tokens,
            lambda: qk_norm_rope_store(
                qkv, weight, weight, 1e-6, cos_sin, tokens, tokens, *layer, *sizes
            ),
            lambda: qk_norm_rope_store_reference(
                qkv, weight, weight, 1e-6, cos_sin, tokens, tokens, *layer, *sizes
            ),
            2 * qkv.nbytes + cos_sin.nbytes,
        )

    def _row_work(
        self, case: str, num_tokens: int, call: Call, peer_call: Call, num_bytes: int
    ) -> Work:
        # Repeated on one input: in a step, too, the kernel before has just written it.
        peer_name = "torch reference"
        return Work(case, num_tokens, 0, [call] * 16, peer_name, [peer_call] * 16, num_bytes)

    def _linear(
        self, name: str, num_tokens: int, out_size: int, in_size: int, is_gated: bool = False
    ) -> Work:
        num_bytes = out_size * in_size * self._item_size
        weights = tuple(self._randn(out_size, in_size) for _ in range(_num_copies(num_bytes)))
        matrix = Matrix(name, weights, None, is_gated)
        table = vendor = LinearTable({})
        if row_bucket(num_tokens) is not None:  # as a worker chooses
            table = table_of(measure([matrix], {}, graph_timer))
        out_bytes = num_tokens * out_size * self._item_size // (2 if is_gated else 1)
        return Work(
            f"linear {name}",
            num_tokens,
            0,
            [matrix.call(table, num_tokens)] * len(weights),
            "torch linear",
            [matrix.call(vendor, num_tokens)] * len(weights),
            num_bytes + num_tokens * in_size * self._item_size + out_bytes,
            2 * num_tokens * out_size * in_size,
        )

    def _cache(self, num_slots: int, context: int, num_layers: int) -> tuple[Tensor, Tensor]:
        """A cache with shuffled blocks, and its block table [num_slots, blocks a slot]."""
        shape, per_slot = self.shape, -(-context // BLOCK_SIZE)
        num_blocks = num_slots * per_slot
        size = (num_blocks, num_layers, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        order = torch.randperm(num_blocks, dtype=torch.int32, device=self.device)
        return self._randn(*size), order.view(num_slots, per_slot)

    def _chunks(self, num_chunks: int, start: int, length: int) -> PrefillChunks:
        bounds = torch.arange(num_chunks + 1, dtype=torch.int32, device=self.device) * length
        return PrefillChunks(
            slots=torch.arange(num_chunks, device=self.device),
            starts=torch.full((num_chunks,), start, dtype=torch.int32, device=self.device),
            cu_lens=bounds,
            max_len=length,
            host_slots=tuple(range(num_chunks)),
            host_starts=(start,) * num_chunks,
            host_lens=(length,) * num_chunks,
        )

    def _weight(self) -> Tensor:
        return self._randn(self.shape.hidden_size)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)


def _num_copies(num_bytes: int, most: int = _MAX_COPIES) -> int:
    """How many inputs of this size leave nothing of the first in L2 when the last is read."""
    return min(max(-(-_PAST_L2_BYTES // num_bytes), 1), most)
