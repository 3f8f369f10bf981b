"""A finished step as the message that rank 0 sends."""

from __future__ import annotations

from torch import Tensor

from protos.lockstep.v1 import worker_pb2
from worker.executor import PendingStep

_TENSOR_FIELDS = {
    "token_ids": "token_ids",
    "flags": "flags",
    "logprobs": "logprobs",
    "top_ids": "top_token_ids",
    "top_logprobs": "top_logprobs",
}


def step_result(
    pending: PendingStep, seconds: float, num_all_reduces: int
) -> worker_pb2.StepResult:
    """Packs the real entries of a step that has ended (`PendingStep.wait`)."""
    result = worker_pb2.StepResult(
        command_id=pending.command_id,
        step=pending.step,
        step_micros=round(seconds * 1e6),
        all_reduce_count=num_all_reduces,
    )
    for name, tensor in pending.tensors.items():
        setattr(result, _TENSOR_FIELDS[name], _packed(tensor[pending.entries]))
    return result


def _packed(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
