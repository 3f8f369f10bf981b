"""The Triton kernels on a GPU: against their references, in graphs, and without recompiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_checks import HEAD_SHAPES, HeadShape, KernelChecks
from tests.helpers.paged_cache import PagedCache, make_chunks
from tests.helpers.step_kernel_checks import check_advance_best, check_row_inputs
from worker.kernels.decode_attention import (
    _decode_attention_kernel,
    decode_attention,
    decode_attention_reference,
)
from worker.kernels.embedding import _embedding_kernel
from worker.kernels.norm import _rms_norm_kernel
from worker.kernels.prefill_attention import _prefill_attention_kernel
from worker.kernels.qk_norm_rope_store import _qk_norm_rope_store_kernel
from worker.kernels.silu_mul import _silu_mul_kernel, silu_mul
from worker.ops import Ops, cuda_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]

DEVICE = torch.device("cuda", 0)
LLAMA_8B = HeadShape(32, 8, 4, 0, 128)
# Not every pair: each is a kernel variant to compile.
ATTENTION_CASES = tuple(zip((*HEAD_SHAPES, LLAMA_8B), (1, 16, 16, 16, 1, 16, 1, 16), strict=True))


@pytest.fixture
def ops() -> Ops:
    return cuda_ops()


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def checks(request: pytest.FixtureRequest, ops: Ops) -> KernelChecks:
    return KernelChecks(ops, DEVICE, request.param)


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(1, 576), (3, 130), (64, 4096), (300, 14336), (2, 8192)]
)
def test_row_kernels_equal_their_references(
    checks: KernelChecks, num_tokens: int, size: int
) -> None:
    checks.norm(num_tokens, size)
    checks.add_norm(num_tokens, size)
    checks.silu_mul(num_tokens, size)
    checks.embedding(num_tokens, size)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("heads", "block_size"), ATTENTION_CASES, ids=str)
def test_qk_norm_rope_store_equals_its_reference(
    checks: KernelChecks, heads: HeadShape, block_size: int, has_norm: bool
) -> None:
    for num_tokens in (1, 5, 300):
        checks.qk_norm_rope_store(heads, num_tokens, heads.head_dim, block_size, has_norm)
    checks.qk_norm_rope_store(heads, 3, heads.head_dim // 2, block_size, has_norm)


@pytest.mark.parametrize(("heads", "block_size"), ATTENTION_CASES, ids=str)
def test_decode_attention_equals_its_reference_over_a_poisoned_cache(
    checks: KernelChecks, heads: HeadShape, block_size: int
) -> None:
    checks.decode_attention(heads, block_size, (1,))
    checks.decode_attention(heads, block_size, (1, 70, 17, 64, 65, 300))


@pytest.mark.parametrize("num_splits", [1, 2, 8, 64])
def test_decode_attention_is_the_same_however_its_context_is_split(
    checks: KernelChecks, ops: Ops, num_splits: int
) -> None:
    split = replace(ops, decode_attention=partial(decode_attention, num_splits=num_splits))
    replace(checks, kernels=split).decode_attention(LLAMA_8B, 16, (1, 1000, 64, 3000))


@pytest.mark.parametrize(("heads", "block_size"), ATTENTION_CASES, ids=str)
def test_prefill_attention_equals_its_reference_over_a_poisoned_cache(
    checks: KernelChecks, heads: HeadShape, block_size: int
) -> None:
    checks.prefill_attention(heads, block_size, (0,), (1,))
    checks.prefill_attention(heads, block_size, (0, 70, 0, 3), (200, 3, 0, 64), num_padding=9)
    checks.prefill_attention(heads, block_size, (500,), (130,))


def test_the_kernels_that_begin_and_end_a_step_equal_their_references(ops: Ops) -> None:
    check_row_inputs(ops, torch.device("cuda"))
    for world_size in (1, 2, 4):
        check_advance_best(ops, torch.device("cuda"), world_size)


def test_results_repeat_bit_for_bit(ops: Ops) -> None:
    cache, q, slots, lens = _decode_inputs((900, 1, 333, 64))
    chunks = make_chunks((0, 2), (100, 0), (800, 333), DEVICE)
    q_chunks = torch.randn(1133, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    tail = (128**-0.5, 4, 0)
    layer = (cache.k_cache, cache.v_cache, cache.block_table)
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.decode_attention(q, *layer, slots, lens, *tail),
        lambda: ops.prefill_attention(q_chunks, *layer, chunks, *tail),
    ]
    for call in calls:
        first = call()
        assert all(torch.equal(call(), first) for _ in range(5))


def test_decode_attention_reaches_blocks_past_2_to_the_31_elements(ops: Ops) -> None:
    num_blocks, block_size, num_layers = 5000, 16, 32
    shape = (num_blocks, num_layers, 2, block_size, 8, 64)
    layers = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    assert layers.numel() > 2**31
    k_cache, v_cache = layers[:, -1, 0], layers[:, -1, 1]
    table = torch.arange(num_blocks - 4, num_blocks, dtype=torch.int32, device=DEVICE)[None]
    k_cache[-4:] = torch.randn(4, 16, 8, 64, device=DEVICE).bfloat16()
    v_cache[-4:] = torch.randn(4, 16, 8, 64, device=DEVICE).bfloat16()
    q = torch.randn(1, 32, 64, device=DEVICE).bfloat16()
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lens = torch.tensor([60], dtype=torch.int32, device=DEVICE)
    arguments = (q, k_cache, v_cache, table, slots, lens, 0.125, 4, 0)
    torch.testing.assert_close(
        ops.decode_attention(*arguments),
        decode_attention_reference(*arguments),
        rtol=1.6e-2,
        atol=8e-3,
    )


def test_a_captured_layer_replays_what_it_would_compute_eagerly_on_new_inputs(ops: Ops) -> None:
    layer = _Layer(ops)
    eager = layer.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run()
    for seed in (0, 1, 2):
        layer.refill(seed)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        layer.refill(seed)
        eager = layer.run()
        for found, wanted in zip(replayed, eager, strict=True):
            assert torch.equal(found, wanted)
            assert bool(found.isfinite().all())


def test_steps_of_other_sizes_and_offsets_compile_nothing(ops: Ops) -> None:
    kernels = (
        _rms_norm_kernel,
        _silu_mul_kernel,
        _embedding_kernel,
        _qk_norm_rope_store_kernel,
        _decode_attention_kernel,
        _prefill_attention_kernel,
    )
    for num_tokens, num_chunks, offset in ((16, 1, 0), (300, 2, 0)):
        _run_step(ops, num_tokens, num_chunks, offset)
    before = [_num_variants(kernel) for kernel in kernels]
    for num_tokens, num_chunks, offset in ((1, 1, 1), (17, 3, 2), (31, 31, 3), (1000, 16, 1)):
        _run_step(ops, num_tokens, num_chunks, offset)
    assert [_num_variants(kernel) for kernel in kernels] == before
    assert all(before)


def _num_variants(kernel: Any) -> int:
    return len(kernel.device_caches[torch.cuda.current_device()][0])


def _decode_inputs(lens: tuple[int, ...]) -> tuple[PagedCache, Tensor, Tensor, Tensor]:
    cache = PagedCache.create(lens, 8, 128, 16, torch.bfloat16, DEVICE)
    q = torch.randn(len(lens), 32, 128, device=DEVICE, dtype=torch.bfloat16)
    contexts = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    return cache, q, torch.arange(len(lens), device=DEVICE), contexts


def _run_step(ops: Ops, num_tokens: int, num_chunks: int, offset: int) -> None:
    """Every kernel once, its index tensors beginning anywhere in larger ones."""

    def indices(dtype: torch.dtype, values: Tensor) -> Tensor:
        padded = torch.zeros(offset + values.numel(), dtype=dtype, device=DEVICE)
        padded[offset:] = values
        return padded[offset:]

    hidden = torch.randn(num_tokens, 512, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(512, device=DEVICE, dtype=torch.bfloat16)
    ops.rms_norm(hidden, weight, 1e-5)
    silu_mul(hidden)
    embeddings = torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)
    ops.embedding(indices(torch.int64, torch.arange(num_tokens)), embeddings, 0, 64)
    cache = torch.zeros(80, 2, 2, 16, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    k_cache, v_cache = cache[:, 1, 0], cache[:, 1, 1]
    positions = indices(torch.int64, torch.arange(num_tokens))
    cos_sin = torch.ones(1024, 64, device=DEVICE)
    q = ops.qk_norm_rope_store(
        hidden, None, None, 1e-5, cos_sin, positions, positions, k_cache, v_cache, 4, 2, 64
    )
    table = torch.zeros(40, 64, dtype=torch.int32, device=DEVICE)
    slots = indices(torch.int64, torch.zeros(num_tokens))
    lens = indices(torch.int32, torch.ones(num_tokens))
    tail = (0.125, 2, 0)
    decode_attention(q, k_cache, v_cache, table, slots, lens, *tail, num_splits=4)
    chunk = num_tokens // num_chunks
    chunks = make_chunks((0,) * num_chunks, (0,) * num_chunks, (chunk,) * num_chunks, DEVICE)
    chunks = replace(
        chunks,
        slots=indices(torch.int64, chunks.slots),
        starts=indices(torch.int32, chunks.starts),
        cu_lens=indices(torch.int32, chunks.cu_lens),
    )
    ops.prefill_attention(q, k_cache, v_cache, table, chunks, *tail)


class _Layer:
    """Every operation in the order of a layer, on inputs that stay at their addresses."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._rows, self._chunk_tokens = 5, 70
        num_tokens = self._rows + self._chunk_tokens
        self._weights = self._randn(0, 100, 256), self._randn(1, 256), self._randn(2, 768, 256)
        self._gate_up = self._randn(3, 1024, 256)
        self._head_weights = self._randn(4, 64), self._randn(5, 64)
        angles = torch.rand(400, 32, device=DEVICE)
        self._cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
        self._cache = torch.empty(200, 2, 2, 16, 4, 64, device=DEVICE, dtype=torch.bfloat16)
        self._token_ids = torch.empty(num_tokens, dtype=torch.int64, device=DEVICE)
        self._positions = torch.empty_like(self._token_ids)
        self._slot_mapping = torch.empty_like(self._token_ids)
        self._table = torch.empty(8, 20, dtype=torch.int32, device=DEVICE)
        self._slots = torch.arange(1, 6, device=DEVICE)
        self._lens = torch.empty(self._rows, dtype=torch.int32, device=DEVICE)
        self._chunks = make_chunks((6, 7), (0, 0), (40, 30), DEVICE)
        self.refill(0)

    def refill(self, seed: int) -> None:
        """Other tokens, lengths, chunk bounds and blocks; a cache as it was before the step."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(199, generator=generator) + 1
        table = order[:160].int().view(8, 20)
        lens = torch.randint(1, 300, (self._rows,), generator=generator)
        starts = torch.randint(0, 200, (2,), generator=generator)
        first = int(torch.randint(1, 69, (1,), generator=generator))
        positions = torch.cat(
            (
                lens - 1,
                starts[0] + torch.arange(first),
                starts[1] + torch.arange(self._chunk_tokens - first),
            )
        )
        slots = torch.tensor([*range(1, 6), *[6] * first, *[7] * (self._chunk_tokens - first)])
        self._slot_mapping.copy_(table[slots, positions // 16].long() * 16 + positions % 16)
        self._positions.copy_(positions)
        self._token_ids.copy_(torch.randint(0, 100, (len(slots),), generator=generator))
        self._table.copy_(table)
        self._lens.copy_(lens)
        self._chunks.starts.copy_(starts)
        self._chunks.cu_lens.copy_(torch.tensor([0, first, self._chunk_tokens]))
        self._cache.copy_(torch.randn(self._cache.shape, generator=generator))

    def run(self) -> list[Tensor]:
        ops, rows = self._ops, self._rows
        embedding_weight, norm_weight, qkv_weight = self._weights
        k_cache, v_cache = self._cache[:, 1, 0], self._cache[:, 1, 1]
        residual = ops.embedding(self._token_ids, embedding_weight, 0, 100)
        normed = ops.rms_norm(residual, norm_weight, 1e-5)
        q = ops.qk_norm_rope_store(
            ops.linear(normed, qkv_weight, None),
            *self._head_weights,
            1e-5,
            self._cos_sin,
            self._positions,
            self._slot_mapping,
            k_cache,
            v_cache,
            4,
            4,
            64,
        )
        layer = (k_cache, v_cache, self._table)
        tail: tuple[float, int, int] = (0.125, 1, 0)
        decoded = ops.decode_attention(q[:rows], *layer, self._slots, self._lens, *tail)
        prefilled = ops.prefill_attention(q[rows:], *layer, self._chunks, *tail)
        attended = torch.cat((decoded, prefilled)).flatten(1)
        normed = ops.add_rms_norm(attended, residual, norm_weight, 1e-5)
        activated = ops.gated_linear(normed, self._gate_up, None)
        return [q, attended, residual, normed, activated, k_cache, v_cache]

    @staticmethod
    def _randn(seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
