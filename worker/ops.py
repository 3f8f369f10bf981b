"""The operations a model is made of, as one value: references on CPU, Triton kernels on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tpcomm.norm_kernel import add_rms_norm_reference
from worker.cpu_packing import packed_gated_linear, packed_linear
from worker.device_tables import DeviceTables
from worker.forward_batch import PrefillChunks
from worker.kernels import (
    advance,
    decode_attention,
    embedding,
    linear,
    norm,
    prefill_attention,
    qk_norm_rope_store,
    row_inputs,
)
from worker.kernels.triton_language import require_triton
from worker.sampling.record import BestRecord
from worker.sampling.tables import SlotSampling


class QkNormRopeStore(Protocol):
    def __call__(
        self,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> Tensor: ...


class DecodeAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        slots: Tensor,
        lens: Tensor,
        scale: float,
        q_per_kv: int,
        q_offset: int,
    ) -> Tensor: ...


class PrefillAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        chunks: PrefillChunks,
        scale: float,
        q_per_kv: int,
        q_offset: int,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """The contract of each is the docstring of its reference in `worker.kernels`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    qk_norm_rope_store: QkNormRopeStore
    decode_attention: DecodeAttention
    prefill_attention: PrefillAttention
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gated_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    embedding: Callable[[Tensor, Tensor, int, int], Tensor]
    row_inputs: Callable[[DeviceTables, int], row_inputs.RowInputs]
    advance_best: Callable[[BestRecord, Tensor, DeviceTables, SlotSampling], advance.Advanced]


def cpu_ops() -> Ops:
    """The plain torch references; they run on any device and are what the kernels must equal."""
    return Ops(
        rms_norm=norm.rms_norm_reference,
        add_rms_norm=add_rms_norm_reference,
        qk_norm_rope_store=qk_norm_rope_store.qk_norm_rope_store_reference,
        decode_attention=decode_attention.decode_attention_reference,
        prefill_attention=prefill_attention.prefill_attention_reference,
        linear=packed_linear,
        gated_linear=packed_gated_linear,
        embedding=embedding.embedding_reference,
        row_inputs=row_inputs.row_inputs_reference,
        advance_best=advance.advance_best_reference,
    )


def cuda_ops() -> Ops:
    """The Triton kernels. Raises TritonNotFound where Triton is not installed."""
    require_triton()
    return Ops(
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        qk_norm_rope_store=qk_norm_rope_store.qk_norm_rope_store,
        decode_attention=decode_attention.decode_attention,
        prefill_attention=prefill_attention.prefill_attention,
        linear=linear.linear,
        gated_linear=linear.gated_linear,
        embedding=embedding.embedding,
        row_inputs=row_inputs.row_inputs,
        advance_best=advance.advance_best,
    )
