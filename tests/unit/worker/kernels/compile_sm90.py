"""Compiles every kernel for Hopper without a GPU; started by test_compile_sm90.py.

Each launcher runs on tensors without storage, and its launch becomes a compilation to machine code
with the very arguments a GPU would get. A program of its own because it stands in for Triton's
driver. Prints one JSON object a kernel: name, dtype, shared memory in bytes, tensor core use.
"""

from __future__ import annotations

import itertools
import json
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.helpers.early_launch import waits_for_previous
from tests.helpers.kernel_checks import HeadShape
from worker.device_tables import DeviceTables
from worker.forward_batch import PrefillChunks
from worker.kernels import (
    advance,
    decode_attention,
    embedding,
    few_rows_linear,
    norm,
    one_row_linear,
    prefill_attention,
    qk_norm_rope_store,
    row_inputs,
    silu_mul,
)
from worker.kernels.linear_tile import ROW_BUCKETS, tiles_for
from worker.kernels.small_linear import small_linear
from worker.sampling import SlotSampling
from worker.sampling.record import RECORD_WORDS, BestRecord


class HopperDriver:
    """What Triton asks of a driver in order to compile."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompileOnly:
    """Takes the place of a kernel: a launch compiles and reports instead."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_report(*args: Any, **options: Any) -> None:
            compiled = self._kernel.warmup(*args, grid=grid, **options)
            ptx = compiled.asm["ptx"]
            report = {
                "kernel": self._kernel.__name__,
                "dtype": str(args[0].dtype),
                "shared_bytes": compiled.metadata.shared,
                "cubin_bytes": len(compiled.asm["cubin"]),
                "waits_for_previous": waits_for_previous(compiled),
                "tensor_core": "mma.sync" in ptx or "wgmma" in ptx,
                "tf32": "tf32" in ptx,
            }
            print(json.dumps(report), flush=True)

        return compile_and_report


def compile_elementwise(dtype: torch.dtype) -> None:
    x, weight = _empty(dtype, 4, 4096), _empty(dtype, 4096)
    norm.rms_norm(x, weight, 1e-5)
    norm.add_rms_norm(x, x, weight, 1e-5)
    silu_mul.silu_mul(_empty(dtype, 4, 2 * 1536))
    embedding.embedding(_empty(torch.int64, 4), _empty(dtype, 1000, 4096), 0, 1000)


def compile_attention(dtype: torch.dtype, heads: HeadShape, block_size: int) -> None:
    num_tokens, kv_heads, head_dim = 200, heads.num_kv_heads, heads.head_dim
    cache = _empty(dtype, 100, 5, 2, block_size, kv_heads, head_dim)
    k_cache, v_cache = cache[:, 0, 0], cache[:, 0, 1]
    indices = _empty(torch.int64, num_tokens)
    weight = _empty(dtype, head_dim) if head_dim == 128 else None
    q = qk_norm_rope_store.qk_norm_rope_store(
        _empty(dtype, num_tokens, (heads.num_q_heads + 2 * kv_heads) * head_dim),
        weight,
        weight,
        1e-5,
        _empty(torch.float32, 1000, head_dim),
        indices,
        indices,
        k_cache,
        v_cache,
        heads.num_q_heads,
        kv_heads,
        head_dim,
    )
    table = _empty(torch.int32, 9, 512)
    tail = (0.1, heads.q_per_kv, heads.q_offset)
    lens = _empty(torch.int32, num_tokens)
    for num_splits in (1, 8) if head_dim == 128 else (8,):
        decode_attention.decode_attention(
            q, k_cache, v_cache, table, indices, lens, *tail, num_splits=num_splits
        )
    slots, starts, cu_lens = indices[:4], _empty(torch.int32, 4), _empty(torch.int32, 5)
    chunks = PrefillChunks(slots, starts, cu_lens, 99, (), (), ())
    prefill_attention.prefill_attention(q, k_cache, v_cache, table, chunks, *tail)


def compile_small_linear(dtype: torch.dtype) -> None:
    for num_rows, in_size in itertools.product(ROW_BUCKETS, (4096, 4112)):
        x, weight, bias = _empty(dtype, num_rows, in_size), _empty(dtype, 4096, in_size), None
        for is_gated, tile in itertools.product((False, True), tiles_for(num_rows, in_size, True)):
            small_linear(x, weight, bias, tile, is_gated)
            bias = _empty(dtype, 4096)


def compile_step() -> None:
    meta = torch.device("meta")
    tables, sampling = DeviceTables(9, 512, 16, meta), SlotSampling(10, 1000, 0, meta)
    slots = row_inputs.row_inputs(tables, 4).slots
    for world_size in (1, 4):
        records = BestRecord(_empty(torch.int32, world_size, 4, RECORD_WORDS))
        advance.advance_best(records, slots, tables, sampling)


def main() -> None:
    driver.set_active(HopperDriver())
    for module, name in (
        (norm, "_rms_norm_kernel"),
        (silu_mul, "_silu_mul_kernel"),
        (embedding, "_embedding_kernel"),
        (qk_norm_rope_store, "_qk_norm_rope_store_kernel"),
        (decode_attention, "_decode_attention_kernel"),
        (decode_attention, "_join_splits_kernel"),
        (one_row_linear, "_one_row_linear_kernel"),
        (few_rows_linear, "_few_rows_linear_kernel"),
        (prefill_attention, "_prefill_attention_kernel"),
        (row_inputs, "_row_inputs_kernel"),
        (advance, "_advance_best_kernel"),
    ):
        _stand_in(module, name)
    compile_step()
    compile_elementwise(torch.bfloat16)
    compile_elementwise(torch.float32)
    compile_small_linear(torch.bfloat16)
    compile_small_linear(torch.float16)
    compile_attention(torch.float16, HeadShape(9, 3, 3, 0, 64), 16)
    compile_attention(torch.float32, HeadShape(9, 3, 3, 0, 64), 16)
    for heads, block_size in (
        (HeadShape(5, 2, 4, 2, 80), 1),
        (HeadShape(32, 8, 4, 0, 128), 16),
        (HeadShape(8, 2, 4, 0, 256), 16),
    ):
        compile_attention(torch.bfloat16, heads, block_size)


def _stand_in(module: ModuleType, name: str) -> None:
    setattr(module, name, CompileOnly(getattr(module, name)))


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


if __name__ == "__main__":
    main()
