"""Exact sampling over vocabulary shards, without gathering the logits."""

from __future__ import annotations

from worker.sampling.counts import add_outputs, mark_chunk, mark_prompt, update_counts
from worker.sampling.exclusions import note_outputs
from worker.sampling.prompt_scores import PromptScores, score_prompt
from worker.sampling.sampler import SampleOutput, sample
from worker.sampling.tables import SlotSampling, is_stop
from worker.sampling_params import (
    MAX_ALTERNATIVES,
    MAX_STOP_IDS,
    SamplePlan,
    SampleVariant,
    SlotParams,
    plan_sample,
)

__all__ = [
    "MAX_ALTERNATIVES",
    "MAX_STOP_IDS",
    "PromptScores",
    "SampleOutput",
    "SamplePlan",
    "SampleVariant",
    "SlotParams",
    "SlotSampling",
    "add_outputs",
    "is_stop",
    "mark_chunk",
    "mark_prompt",
    "note_outputs",
    "plan_sample",
    "sample",
    "score_prompt",
    "update_counts",
]
