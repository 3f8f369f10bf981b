"""Runs every kind of eager step once, so that nothing compiles or connects while serving."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from protos.lockstep.v1 import worker_pb2
from worker.model_runner import ModelRunner
from worker.sampling_params import SamplePlan, SampleVariant, SlotParams, plan_sample
from worker.tables import DUMMY_SLOT, Chunk, Sequence

_EVERY_PLAN = (
    SamplePlan(SampleVariant.LOCAL_BEST, all_greedy=True),
    SamplePlan(SampleVariant.LOCAL_BEST, with_penalties=True, with_logprobs=True),
    SamplePlan(SampleVariant.TOP_CANDIDATES, with_penalties=True, with_logprobs=True),
    SamplePlan(SampleVariant.THRESHOLD, with_penalties=True, with_logprobs=True),
    SamplePlan(with_bias=True, with_bad_words=True, with_mask=True),
)


def warm_up(runner: ModelRunner, config: worker_pb2.EngineConfig) -> None:
    """Runs prefill, mixed and decode steps on the dummy slot and block. Collective.

    The largest mixed step also makes torch's allocator take the memory that it needs, before the
    KV cache takes the rest. The dummy slot stays inert: it emits nothing and changes no table.
    """
    lengths = [1, 2, 17, config.max_batch_tokens] if runner.tables.device.type == "cuda" else [2]
    for length in lengths:
        for num_rows in (0, 1):
            chunk = _dummy_chunk(min(length, config.max_batch_tokens - num_rows), config)
            runner.mixed_step(num_rows, [chunk], plan_sample([SlotParams()]))
    scored = _dummy_chunk(lengths[-1], config)
    scored = replace(scored, targets=np.zeros(len(scored.token_ids), np.int32))
    runner.mixed_step(0, [scored], plan_sample([SlotParams()]))
    for plan in _EVERY_PLAN:
        runner.decode_step(1, plan)
    if runner.tables.device.type == "cuda":
        torch.cuda.synchronize(runner.tables.device)


def _dummy_chunk(length: int, config: worker_pb2.EngineConfig) -> Chunk:
    """A prompt of zeros whose every position lies in block 0."""
    length = max(1, min(length, config.max_model_len))
    num_blocks = -(-length // config.block_size)
    sequence = Sequence(DUMMY_SLOT, length, length, length, [0] * num_blocks, SlotParams())
    return Chunk(sequence, 0, np.zeros(length, np.int32))
