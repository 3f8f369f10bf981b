# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""All-reduce, residual addition and RMS normalisation: the reference, and one kernel.

Between a row-parallel and the next column-parallel layer every rank needs the sum of the partial
results, added to the residual stream and normalised. The kernel takes a row per program: one-shot
exchange (staging_tables) with addition and norm on the way out, instead of two kernels and a pass
over memory between them. With one rank it is the addition and the norm alone.

Source of the norm: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tpcomm.allreduce_kernels import word_type
from tpcomm.push_protocol import (
    begin_call,
    combine,
    end_call,
    float_words,
    look,
    send,
    wipe,
    word_row,
)
from tpcomm.record_kernels import record_begin, record_end
from tpcomm.size_table import ADD_RMS_NORM, FUSED
from tpcomm.staging_tables import StagingTables, vector_width
from tpcomm.triton_language import Launch, after_previous, constant, device_function, jit, tl

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HIDDEN = 16384
_MAX_WARPS = 16
_VECTORS_PER_THREAD = 2  # 1 to 4 take the same time on two H200, within 0.1 us
_MIN_BLOCK = 64
_LOOKS_PER_CHECK = constant(8)  # of the abort word, and of whether a NaN is what was sent


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` IN PLACE (rounded to its dtype) and return the norm of the sum.

    x and residual [num_tokens, hidden_size], weight [hidden_size]; `x` is left alone.
    """
    residual.add_(x)
    return functional.rms_norm(residual, (residual.shape[-1],), weight, eps)


@device_function
def _add(x, residual, inside):
    """(sum, sum of its squares). Rounded before it is squared: later layers see the rounded sum,
    and so does the reference."""
    x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
    value = tl.where(inside, x.to(tl.float32), 0.0)
    return x, tl.sum(value * value, axis=0)


@jit(varying=("x_ptr", "eps"))
def tpcomm_all_reduce_add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    bases_ptr,
    state_ptr,
    abort_ptr,
    ring_ptr,
    eps,
    RANK: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    NUM_STATES: tl.constexpr,
    WORLD_SIZE: tl.constexpr,
    CODE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    WORD: tl.constexpr,
):
    after_previous()
    dtype = x_ptr.dtype.element_ty
    dims = tl.arange(0, BLOCK)
    inside = dims // VECTOR < HIDDEN // VECTOR
    offsets = tl.program_id(0) * HIDDEN + dims
    if VECTOR > 1:
        x_ptr = tl.multiple_of(x_ptr.to(tl.int64).to(tl.pointer_type(dtype)), 16)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if WORLD_SIZE > 1:
        own_base = tl.load(bases_ptr + RANK)
        own_words = float_words(x, WORD)
        state, place, wiped = begin_call(state_ptr, SLOT_BYTES, WORLD_SIZE)
        for step in tl.static_range(1, WORLD_SIZE):
            base = tl.load(bases_ptr + (RANK + step) % WORLD_SIZE)
            send(word_row(base, place, RANK, SLOT_BYTES, WORD) + offsets, own_words, inside)
    # Behind the sending: before it, they would delay it.
    residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0)
    if WORLD_SIZE > 1:
        word_bytes: tl.constexpr = WORD.primitive_bitwidth // 8
        row_words: tl.constexpr = SLOT_BYTES // word_bytes
        used = tl.num_programs(0) * (HIDDEN * word_bytes)
        wipe(own_base, state, wiped, RANK, SLOT_BYTES, WORLD_SIZE, BLOCK * word_bytes // 8)
        end_call(state_ptr, state, used, NUM_STATES, BLOCK)
        begun = record_begin(ring_ptr, state, used, CODE)
        first_row = word_row(own_base, place, 0, SLOT_BYTES, WORD)
        arrived = look(first_row, offsets, own_words, inside, RANK, row_words, WORLD_SIZE)
        pending, squares = 1, 0.0
        num_looks = tl.zeros((), tl.int32)
        while pending != 0:
            # The next look is on its way while this one is judged.
            later = look(first_row, offsets, own_words, inside, RANK, row_words, WORLD_SIZE)
            total, missing = combine(arrived, RANK, WORLD_SIZE, dtype, False, BLOCK)
            # To dtype, as an all-reduce of its own would have stored it.
            x, squares = _add(total.to(dtype), residual, inside)
            # What is missing makes the sum NaN, so as a rule the threads meet over it alone.
            pending = (squares != squares).to(tl.int32)
            num_looks += 1
            if num_looks % _LOOKS_PER_CHECK == 0:
                aborted = tl.load(abort_ptr, volatile=True)
                pending = tl.max(missing & (aborted == 0).to(tl.int32), axis=0)
            arrived = later
    else:
        x, squares = _add(x, residual, inside)
    tl.store(residual_ptr + offsets, x, mask=inside)
    inverse_rms = tl.rsqrt(squares / HIDDEN + eps)
    out = (x.to(tl.float32) * inverse_rms * weight.to(tl.float32)).to(dtype)
    tl.store(out_ptr + offsets, out, mask=inside)
    if WORLD_SIZE > 1:
        record_end(ring_ptr, state, begun, CODE)


def fused_refusal(x: Tensor, residual: Tensor, weight: Tensor) -> str:
    """Why the kernel does not take these tensors; empty if it does."""
    if x.dtype not in FUSED_DTYPES or residual.dtype != x.dtype or weight.dtype != x.dtype:
        return f"dtypes {x.dtype}, {residual.dtype}, {weight.dtype}: one float dtype is needed"
    if x.dim() != 2 or residual.shape != x.shape or weight.shape != x.shape[1:]:
        return f"shapes {tuple(x.shape)}, {tuple(residual.shape)}, {tuple(weight.shape)}"
    if not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()):
        return "a tensor is not contiguous"
    if x.shape[1] > _MAX_HIDDEN:
        return f"rows of {x.shape[1]} are above {_MAX_HIDDEN}"
    return ""


def fits_add_rms_norm(x: Tensor, tables: StagingTables) -> bool:
    """Whether `all_reduce_add_rms_norm` takes rows of this size and number."""
    fits = 0 < x.nbytes <= tables.slot_bytes
    return fits and tables.fits(len(x), _num_warps(x))


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, tables: StagingTables
) -> Tensor:
    """Sum `x` over ranks, add it to `residual` IN PLACE, return the norm of that, as one kernel.

    `fits_add_rms_norm` holds and `fused_refusal` is empty.
    `x` is left alone. Otherwise as `one_shot_all_reduce`.
    """
    assert fits_add_rms_norm(x, tables), x.shape
    out = torch.empty_like(x)
    fused_launch(x, residual, weight, out, eps, tables).run()
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`add_rms_norm_reference` as one kernel."""
    out = torch.empty_like(x)
    fused_launch(x, residual, weight, out, eps, None).run()
    return out


def fused_launch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    tables: StagingTables | None,
) -> Launch:
    """What `all_reduce_add_rms_norm` runs, or, without tables, `add_rms_norm`."""
    hidden_size = x.shape[1]
    block = _block(hidden_size)
    vector = vector_width(x, residual, weight, out)
    if tables is None:
        addresses: tuple[object, ...] = (None, None, None, None, eps, 0, 0, 0, 1, 0)
    else:
        addresses = (
            *tables.addresses,
            eps,
            tables.rank,
            tables.slot_bytes,
            tables.state.numel(),
            tables.world_size,
            tables.code(ADD_RMS_NORM, FUSED),
        )
    shape = (hidden_size, block, vector, word_type(x.dtype))
    arguments = (x, residual, weight, out, *addresses, *shape)
    # With and without tables alike, as the order of the sum of squares depends on it.
    return Launch(tpcomm_all_reduce_add_rms_norm, arguments, len(x), _num_warps(x))


def _block(hidden_size: int) -> int:
    return int(max(1 << (hidden_size - 1).bit_length(), _MIN_BLOCK))


def _num_warps(x: Tensor) -> int:
    row_vectors = _block(x.shape[1]) * x.dtype.itemsize // 16
    return min(max(row_vectors // (32 * _VECTORS_PER_THREAD), 1), _MAX_WARPS)
