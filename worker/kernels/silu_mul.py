# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The gated activation of the feed-forward layer, `silu(gate) * up`.

Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.triton_language import after_previous, early_launch
from worker.kernels.triton_language import jit, tl

_BLOCK = 1024


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * ffn_size], gate in the first half -> [num_tokens, ffn_size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


@jit()
def _silu_mul_kernel(gate_up_ptr, out_ptr, gate_up_stride, FFN: tl.constexpr, BLOCK: tl.constexpr):
    after_previous()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FFN
    gate_row = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(gate_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_row + FFN, mask=inside, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * FFN + columns, out, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu_mul_reference` as one kernel, rounded once where the reference rounds twice."""
    num_tokens, ffn_size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * ffn_size and gate_up.stride(1) == 1, gate_up.shape
    out = torch.empty((num_tokens, ffn_size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_tokens, -(-ffn_size // _BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        FFN=ffn_size,
        BLOCK=_BLOCK,
        num_warps=4,
        **early_launch(),
    )
    return out
