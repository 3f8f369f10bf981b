"""A finished step as the message that rank 0 sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from protos.lockstep.v1 import worker_pb2

# Which entries of a step's tensors are real.
Entries: TypeAlias = slice | list[int]

_TENSOR_FIELDS = {
    "token_ids": "token_ids",
    "flags": "flags",
    "logprobs": "logprobs",
    "top_ids": "top_token_ids",
    "top_logprobs": "top_logprobs",
}
# Of prompt tokens, not of entries.
_PROMPT_FIELDS = {
    "prompt_logprobs": "prompt_logprobs",
    "prompt_top_ids": "prompt_top_token_ids",
    "prompt_top_logprobs": "prompt_top_logprobs",
}


def step_result(
    command_id: int, step: int, tensors: Mapping[str, Tensor], entries: Entries
) -> worker_pb2.StepResult:
    """Packs the real entries of a step that has ended."""
    result = worker_pb2.StepResult(command_id=command_id, step=step)
    for name, tensor in tensors.items():
        if name in _PROMPT_FIELDS:
            setattr(result, _PROMPT_FIELDS[name], _packed(tensor))
        else:
            setattr(result, _TENSOR_FIELDS[name], _packed(tensor[entries]))
    return result


def _packed(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()
