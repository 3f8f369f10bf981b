"""Each Triton kernel against its reference, on any device that can run both.

The reference gets the same inputs in float32 on the CPU, so that a tolerance is the kernel's own
rounding: a few units in the last place of its dtype, and of the largest value that is summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers.paged_cache import PagedCache, make_chunks
from worker.kernels.silu_mul import silu_mul, silu_mul_reference
from worker.ops import Ops, cpu_ops

_RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class HeadShape:
    num_q_heads: int
    num_kv_heads: int
    q_per_kv: int
    q_offset: int
    head_dim: int


# Whole groups (of heads shorter than a tile too), a group begun and ended by other ranks, one query
# head a KV head, one KV head.
HEAD_SHAPES = (
    HeadShape(9, 3, 3, 0, 64),
    HeadShape(6, 2, 3, 0, 8),
    HeadShape(5, 2, 4, 2, 80),
    HeadShape(3, 3, 1, 0, 96),
    HeadShape(8, 2, 4, 0, 128),
    HeadShape(20, 1, 20, 0, 128),
    HeadShape(4, 1, 4, 0, 256),
)


@dataclass(frozen=True)
class KernelChecks:
    """Runs `kernels` on `device` in `dtype`; every method raises AssertionError on a difference."""

    kernels: Ops
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def norm(self, num_tokens: int, hidden_size: int) -> None:
        x, weight = self._randn(num_tokens, hidden_size), self._randn(hidden_size)
        wanted = cpu_ops().rms_norm(_upcast(x), _upcast(weight), 1e-5)
        self._close(self.kernels.rms_norm(x, weight, 1e-5), wanted)

    def add_norm(self, num_tokens: int, hidden_size: int) -> None:
        x, weight = self._randn(num_tokens, hidden_size), self._randn(hidden_size)
        residual = self._randn(num_tokens, hidden_size, seed=1)
        wanted_sum = (_upcast(x) + _upcast(residual)).to(self.dtype)
        wanted = cpu_ops().rms_norm(wanted_sum.float(), _upcast(weight), 1e-5)
        untouched = x.clone()
        self._close(self.kernels.add_rms_norm(x, residual, weight, 1e-5), wanted)
        assert torch.equal(residual.cpu(), wanted_sum)
        assert torch.equal(x, untouched)

    def silu_mul(self, num_tokens: int, ffn_size: int) -> None:
        gate_up = self._randn(num_tokens, 2 * ffn_size)
        self._close(silu_mul(gate_up), silu_mul_reference(_upcast(gate_up)))

    def embedding(self, num_tokens: int, hidden_size: int) -> None:
        weight = self._randn(30, hidden_size)
        token_ids = torch.arange(num_tokens, device=self.device) * 7 % 50
        found = self.kernels.embedding(token_ids, weight, 11, 25)
        wanted = cpu_ops().embedding(token_ids.cpu(), weight.cpu(), 11, 25)
        assert torch.equal(found.cpu(), wanted)

    def qk_norm_rope_store(
        self, heads: HeadShape, num_tokens: int, rotary_dim: int, block_size: int, has_norm: bool
    ) -> None:
        num_heads = heads.num_q_heads + 2 * heads.num_kv_heads
        qkv = self._randn(num_tokens, num_heads * heads.head_dim)
        q_weight = self._randn(heads.head_dim, seed=1) if has_norm else None
        k_weight = self._randn(heads.head_dim, seed=2) if has_norm else None
        angles = self._randn(40, rotary_dim // 2).float()
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        positions = torch.arange(num_tokens, device=self.device) * 3 % 40
        num_blocks = -(-num_tokens // block_size) + 2
        order = torch.randperm(num_blocks * block_size, generator=self._generator(3))
        slot_mapping = order[:num_tokens].to(self.device)
        shape = (num_blocks, 3, 2, block_size, heads.num_kv_heads, heads.head_dim)
        found_cache = torch.full(shape, -1.0, dtype=self.dtype, device=self.device)
        wanted_cache = torch.full(shape, -1.0)
        sizes = (heads.num_q_heads, heads.num_kv_heads, heads.head_dim)
        found = self.kernels.qk_norm_rope_store(
            qkv, q_weight, k_weight, 1e-6, cos_sin, positions, slot_mapping,
            found_cache[:, 1, 0], found_cache[:, 1, 1], *sizes,
        )  # fmt: skip
        wanted = cpu_ops().qk_norm_rope_store(
            _upcast(qkv), _upcast_weight(q_weight), _upcast_weight(k_weight), 1e-6,
            cos_sin.cpu(), positions.cpu(), slot_mapping.cpu(),
            wanted_cache[:, 1, 0], wanted_cache[:, 1, 1], *sizes,
        )  # fmt: skip
        self._close(found, wanted)
        self._close(found_cache, wanted_cache)
        # Values are copied, not computed.
        assert torch.equal(found_cache[:, 1, 1].cpu(), wanted_cache[:, 1, 1].to(self.dtype))

    def decode_attention(self, heads: HeadShape, block_size: int, lens: tuple[int, ...]) -> None:
        cache = self._cache(lens, heads, block_size)
        q = self._randn(len(lens), heads.num_q_heads, heads.head_dim)
        slots = torch.arange(len(lens)).flip(0)
        contexts = torch.tensor(lens, dtype=torch.int32).flip(0)
        tail = (heads.head_dim**-0.5, heads.q_per_kv, heads.q_offset)
        wanted = cpu_ops().decode_attention(
            _upcast(q), _upcast(cache.k_cache), _upcast(cache.v_cache), cache.block_table.cpu(),
            slots, contexts, *tail,
        )  # fmt: skip
        assert bool(wanted.isfinite().all())
        found = self.kernels.decode_attention(
            q, cache.k_cache, cache.v_cache, cache.block_table,
            slots.to(self.device), contexts.to(self.device), *tail,
        )  # fmt: skip
        self._close(found, wanted)

    def prefill_attention(
        self,
        heads: HeadShape,
        block_size: int,
        starts: tuple[int, ...],
        lens: tuple[int, ...],
        num_padding: int = 0,
    ) -> None:
        contexts = tuple(start + length for start, length in zip(starts, lens, strict=True))
        # One slot more than is used, and chunks that do not start at slot 0.
        cache = self._cache((1, *(max(context, 1) for context in contexts)), heads, block_size)
        slots = tuple(range(1, len(lens) + 1))
        q = self._randn(sum(lens) + num_padding, heads.num_q_heads, heads.head_dim)
        tail = (heads.head_dim**-0.5, heads.q_per_kv, heads.q_offset)
        wanted = cpu_ops().prefill_attention(
            _upcast(q), _upcast(cache.k_cache), _upcast(cache.v_cache), cache.block_table.cpu(),
            make_chunks(slots, starts, lens, torch.device("cpu")), *tail,
        )  # fmt: skip
        assert bool(wanted.isfinite().all())
        found = self.kernels.prefill_attention(
            q, cache.k_cache, cache.v_cache, cache.block_table,
            make_chunks(slots, starts, lens, self.device), *tail,
        )  # fmt: skip
        self._close(found, wanted)

    def _cache(self, lens: tuple[int, ...], heads: HeadShape, block_size: int) -> PagedCache:
        return PagedCache.create(
            lens, heads.num_kv_heads, heads.head_dim, block_size, self.dtype, self.device, self.seed
        )

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.seed + seed)

    def _randn(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=self._generator(seed)).to(self.dtype).to(self.device)

    def _close(self, found: Tensor, wanted: Tensor) -> None:
        assert found.dtype == self.dtype
        relative = _RELATIVE[self.dtype]
        torch.testing.assert_close(
            found.float().cpu(), wanted, rtol=relative, atol=relative * 0.5, equal_nan=False
        )


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.cpu().float()


def _upcast_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else _upcast(weight)
