"""Runs every kernel under Triton's interpreter on the CPU; started by test_interpreted.py.

A program of its own because TRITON_INTERPRET=1 must be set before Triton is imported. Float32 and
float16 only: the interpreter multiplies the raw bits of bfloat16 matrices.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from triton.runtime import interpreter

from tests.helpers.kernel_checks import HEAD_SHAPES, KernelChecks
from tests.helpers.linear_checks import LinearChecks
from tests.helpers.step_kernel_checks import check_advance_best, check_row_inputs
from worker.kernels.decode_attention import decode_attention
from worker.kernels.linear_tile import LinearTile
from worker.ops import cuda_ops


def allow_numpy_2_4() -> None:
    """Triton 3.6 takes int() of one-element arrays, which numpy 2.4 refuses; use item() instead."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def sweep_small_linear() -> None:
    """Whole and ragged tiles, with and without groups, both kernels."""
    checks = LinearChecks(torch.device("cpu"), torch.float16)
    one_row = (LinearTile(1, 4, 64), LinearTile(1, 8, 512))
    few_rows = (LinearTile(16, 64, 64), LinearTile(16, 32, 32, num_groups=2))
    for num_rows, tiles in ((1, one_row), (3, few_rows), (16, few_rows)):
        for tile in tiles:
            for out_size, in_size in ((64, 512), (38, 336)):
                checks.product(num_rows, out_size, in_size, tile, has_bias=out_size == 38)
                checks.product(num_rows, out_size, in_size, tile, is_gated=True)
            checks.product(num_rows, 38, 336, tile, has_bias=True, is_gated=True)


def main() -> None:
    allow_numpy_2_4()
    torch.set_num_threads(1)
    sweep_small_linear()
    check_row_inputs(cuda_ops(), torch.device("cpu"))
    for world_size in (1, 2, 4):
        check_advance_best(cuda_ops(), torch.device("cpu"), world_size)
    for dtype, num_shapes in ((torch.float32, len(HEAD_SHAPES)), (torch.float16, 2)):
        checks = KernelChecks(cuda_ops(), torch.device("cpu"), dtype)
        checks.norm(3, 576)
        checks.norm(2, 130)
        checks.add_norm(3, 576)
        checks.silu_mul(3, 1100)
        checks.embedding(12, 1030)
        block_sizes = (1, 4, 16, 16, 4, 16, 1)[:num_shapes]
        for heads, block_size in zip(HEAD_SHAPES[:num_shapes], block_sizes, strict=True):
            for has_norm, rotary_dim in ((True, heads.head_dim), (False, heads.head_dim // 2)):
                checks.qk_norm_rope_store(heads, 5, rotary_dim, block_size, has_norm)
            checks.decode_attention(heads, block_size, (1, 70, 17))
            checks.prefill_attention(heads, block_size, (0, 70), (40, 3), num_padding=3)
        checks.qk_norm_rope_store(HEAD_SHAPES[0], 257, 64, 16, False)
        checks.prefill_attention(HEAD_SHAPES[0], 16, (0, 0, 9), (1, 0, 1))
        for num_splits in (2, 8):
            split = partial(decode_attention, num_splits=num_splits)
            split_checks = replace(checks, kernels=replace(cuda_ops(), decode_attention=split))
            split_checks.decode_attention(HEAD_SHAPES[1], 16, (1, 300, 64))


if __name__ == "__main__":
    main()
    print("interpreted sweep passed", file=sys.stderr)
