"""Weights in oneDNN's own order, for the CPU.

A GEMM of few rows reads the weights once, so its speed is that of reading them. Kept row-major,
oneDNN reorders or strides through them at every call; packed once, a decode step's matrices
multiply in two thirds of the time, and larger batches gain too.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from worker.kernels.silu_mul import silu_mul_reference
from worker.weight_layout import LayerWeights, TransformerWeights


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has packed kernels of this dtype for this processor."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def pack_weights(weights: TransformerWeights) -> TransformerWeights:
    """Pack every matrix that is multiplied with; the row-major originals are FREED.

    Memory peaks at one matrix above the weights' own. An LM head tied to the embedding becomes a
    packed copy beside it, since the embedding looks up rows: it is a quarter of a small model's
    decode step, and twice as fast packed.
    """
    is_tied = weights.lm_head is weights.embedding
    return dataclasses.replace(
        weights,
        layers=tuple(_pack_layer(layer) for layer in weights.layers),
        lm_head=_packed(weights.lm_head) if is_tied else _pack(weights.lm_head),
    )


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `linear`, for a packed or a row-major weight [out_size, in_size]."""
    if weight.is_mkldnn:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        product: Tensor = multiply(x, weight, bias, "none", [], "")
        return product
    return torch.nn.functional.linear(x, weight, bias)


def packed_gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `gated_linear`, for a packed or a row-major weight."""
    return silu_mul_reference(packed_linear(x, weight, bias))


def _pack_layer(layer: LayerWeights) -> LayerWeights:
    return dataclasses.replace(
        layer,
        qkv=_pack(layer.qkv),
        o=_pack(layer.o),
        gate_up=_pack(layer.gate_up),
        down=_pack(layer.down),
    )


def _pack(weight: Tensor) -> Tensor:
    packed = _packed(weight)
    weight.untyped_storage().resize_(0)
    return packed


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed
