"""Rows to sample, cut over vocabulary shards, for the CPU tests and the GPU tests alike."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from worker.sampling import (
    SampleOutput,
    SamplePlan,
    SampleVariant,
    SlotParams,
    SlotSampling,
    add_outputs,
    mark_prompt,
    plan_sample,
    sample,
)
from worker.sampling.reference import ReferenceSample, sample_reference
from worker.sampling_params import MAX_BAD_WORD_IDS

CPU = torch.device("cpu")
GRANULE = 64
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Row:
    params: SlotParams
    position: int = 7
    prompt_ids: tuple[int, ...] = ()
    output_ids: tuple[int, ...] = ()
    allowed_ids: tuple[int, ...] | None = None

    @property
    def slot_params(self) -> SlotParams:
        """The parameters as a slot gets them when it is opened."""
        recent = self.output_ids[1 - MAX_BAD_WORD_IDS :] if self.params.bad_words else ()
        is_constrained = self.allowed_ids is not None
        return replace(self.params, recent_ids=recent, is_constrained=is_constrained)


def allowed_bits(row: Row, vocab_size: int) -> UInt8Array:
    """The row's mask as a command brings it."""
    is_allowed = np.zeros(vocab_size, np.bool_)
    is_allowed[list(row.allowed_ids or ())] = True
    return np.packbits(is_allowed, bitorder="little")


def shard_bounds(vocab_size: int, world_size: int) -> list[tuple[int, int]]:
    """First and past-the-last id of each rank: granules of 64 dealt out, the last one partial."""
    num_granules = -(-vocab_size // GRANULE)
    cuts = [GRANULE * (num_granules * rank // world_size) for rank in range(world_size)]
    return list(zip(cuts, [*cuts[1:], vocab_size], strict=True))


def make_shard(
    logits: Tensor, rows: Sequence[Row], rank: int, world_size: int, device: torch.device = CPU
) -> tuple[Tensor, SlotSampling]:
    """One rank's padded logits [N, padded_vocab] and its tables; row i is in slot N - i."""
    bounds = shard_bounds(logits.shape[1], world_size)
    padded = max(GRANULE * -(-(stop - start) // GRANULE) for start, stop in bounds)
    start, stop = bounds[rank]
    local = torch.full((logits.shape[0], padded), -math.inf)
    local[:, : stop - start] = logits[:, start:stop]
    tables = SlotSampling(len(rows) + 1, padded, start, device)
    tables.set_rows(slots_of(rows), [row.slot_params for row in rows])
    tables.choices.set_masks(
        [
            (slot, allowed_bits(row, logits.shape[1]))
            for slot, row in zip(slots_of(rows), rows, strict=True)
            if row.allowed_ids is not None
        ]
    )
    marked: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for slot, row in zip(slots_of(rows), rows, strict=True):
        like = marked.setdefault((row.prompt_ids, row.output_ids), slot)
        if like != slot:
            tables.counts[slot] = tables.counts[like]
        else:
            mark_prompt(tables, slot, torch.tensor(row.prompt_ids, dtype=torch.int64).to(device))
            add_outputs(tables, slot, torch.tensor(row.output_ids, dtype=torch.int64).to(device))
    return local.to(device), tables


def slots_of(rows: Sequence[Row]) -> list[int]:
    return list(range(len(rows), 0, -1))


def sample_shard(
    local: Tensor,
    tables: SlotSampling,
    slots: Tensor,
    positions: Tensor,
    plan: SamplePlan,
    comm: ThreadCommunicator,
) -> SampleOutput:
    return sample(local, slots, positions, tables, comm, plan)


def sample_rows(
    logits: Tensor,
    rows: Sequence[Row],
    world_size: int = 1,
    plan: SamplePlan | None = None,
    device: torch.device = CPU,
) -> list[SampleOutput]:
    """Every rank's output for `logits` float32 [N, vocab_size]; the rows' own plan by default."""
    plan = plan or plan_sample([row.slot_params for row in rows])

    def one_rank(comm: ThreadCommunicator) -> SampleOutput:
        local, tables = make_shard(logits, rows, comm.rank, world_size, device)
        slots = torch.tensor(slots_of(rows), device=device)
        positions = torch.tensor([row.position for row in rows], device=device)
        return sample_shard(local, tables, slots, positions, plan, comm)

    return run_ranks(world_size, one_rank)


def expected_rows(logits: Tensor, rows: Sequence[Row]) -> list[ReferenceSample]:
    return [
        sample_reference(
            line, row.params, row.position, row.prompt_ids, row.output_ids, row.allowed_ids
        )
        for line, row in zip(logits, rows, strict=True)
    ]


def token_ids(output: SampleOutput) -> list[int]:
    ids: list[int] = output.token_ids.tolist()
    return ids


def strongest_plan(variant: SampleVariant, with_logprobs: bool = False) -> SamplePlan:
    """`variant` with every optional piece of work switched on."""
    return SamplePlan(
        variant,
        with_penalties=True,
        with_logprobs=with_logprobs,
        with_bias=True,
        with_bad_words=True,
        with_mask=True,
    )


def random_rows(count: int, vocab_size: int, variant: SampleVariant, seed: int) -> list[Row]:
    """Rows that `variant` serves, of all kinds: greedy, filtered, penalised, with logprobs,
    biases, bad words (some of which the output has begun) and constraints."""
    draw = random.Random(seed)
    rows: list[Row] = []
    while len(rows) < count:
        prompt = tuple(draw.choices(range(vocab_size), k=draw.randrange(1, 30)))
        output = tuple(draw.choices(range(vocab_size), k=draw.randrange(12)))
        penalised = draw.random() < 0.4
        params = SlotParams(
            temperature=draw.choice([0.0, 0.3, 1.0, 2.0]),
            top_k=draw.choice([0, 0, 1, 5, 64, 65, 300]),
            top_p=draw.choice([1.0, 0.95, 0.5, 1e-9]),
            min_p=draw.choice([0.0, 0.0, 0.02, 1.0]),
            seed=draw.getrandbits(64),
            repetition_penalty=draw.choice([1.3, 0.8]) if penalised else 1.0,
            presence_penalty=draw.choice([0.0, 1.5]) if penalised else 0.0,
            frequency_penalty=draw.choice([-0.5, 0.7]) if penalised else 0.0,
            prompt_len=len(prompt),
            min_tokens=draw.choice([0, 5]),
            stop_ids=tuple(draw.choices(range(vocab_size), k=draw.randrange(17))),
            num_logprobs=draw.choice([None, 0, 20]),
            logit_bias=_random_bias(draw, vocab_size) if draw.random() < 0.3 else (),
            bad_words=_random_bad_words(draw, vocab_size, output) if draw.random() < 0.3 else (),
        )
        allowed = None
        if draw.random() < 0.3:
            allowed = tuple(draw.sample(range(vocab_size), draw.randrange(35, vocab_size)))
        if params.variant <= variant:
            rows.append(Row(params, len(prompt) + len(output), prompt, output, allowed))
    return rows


def _random_bias(draw: random.Random, vocab_size: int) -> tuple[tuple[int, float], ...]:
    ids = draw.sample(range(vocab_size), draw.randrange(1, min(vocab_size, 300)))
    return tuple((token_id, draw.choice([-100.0, -1.5, 0.25, 8.0])) for token_id in ids)


def _random_bad_words(
    draw: random.Random, vocab_size: int, output: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    words: list[tuple[int, ...]] = []
    for _ in range(draw.randrange(1, 17)):
        num_begun = draw.randrange(min(len(output), 3) + 1)
        begun = output[len(output) - num_begun :] if draw.random() < 0.7 else (1, 2)
        words.append((*begun, draw.randrange(vocab_size)))
    return tuple(words)
