"""Each sampling kernel against its reference, on any device that can run both.

References run on the CPU. Logarithms and exponentials may differ in their last bits between
devices, so values have tolerances; ids, counts and penalised logits are equal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.helpers.sampling_cases import CPU
from worker.sampling import SlotParams, SlotSampling
from worker.sampling.exclusions import apply_mask_reference
from worker.sampling.fixed_point import MASS_BITS, fixed_mass_reference
from worker.sampling.gumbel_kernel import gumbel_argmax, gumbel_at
from worker.sampling.local_best import best_reference, scale_logits
from worker.sampling.mask_kernel import apply_mask_kernel
from worker.sampling.mass_kernel import digit_sums_kernel, fixed_mass_kernel
from worker.sampling.penalties import apply_penalties_reference
from worker.sampling.penalty_kernel import apply_penalties_kernel
from worker.sampling.philox import gumbel_at_reference
from worker.sampling.record import BestRecord, Bounds
from worker.sampling.tables import PROMPT_BIT
from worker.sampling.threshold import digit_sums_reference

NUM_ROWS = 5
SLOTS = torch.tensor([5, 3, 1, 2, 4])
POSITIONS = torch.tensor([0, 3, 70_000, 10_000, 10_001])


def make_tables(
    vocab: int, vocab_start: int, all_greedy: bool, device: torch.device
) -> SlotSampling:
    """Five rows of different kinds, with random counts that are the same on every device."""
    last = vocab_start + vocab - 1
    rows = [
        SlotParams(),
        SlotParams(0.5, seed=(1 << 64) - 1, repetition_penalty=1.3, presence_penalty=0.3),
        SlotParams(2.0, seed=1, min_tokens=5, stop_ids=(vocab_start, last, 0, vocab_start + 70)),
        SlotParams(1.0, seed=1 << 40, min_tokens=3, stop_ids=(last,), prompt_len=9998),
        SlotParams(1.5, frequency_penalty=-0.2, presence_penalty=-0.1),
    ]
    if all_greedy:
        rows = [SlotParams(repetition_penalty=row.repetition_penalty) for row in rows]
    tables = SlotSampling(NUM_ROWS + 1, vocab, vocab_start, device)
    tables.set_rows(SLOTS.tolist(), rows)
    draw = torch.Generator().manual_seed(vocab)
    shape = tables.counts.shape
    outputs = torch.randint(0, 4, shape, generator=draw) * torch.randint(
        0, 2, shape, generator=draw
    )
    prompt = torch.randint(0, 2, shape, generator=draw) * PROMPT_BIT
    tables.counts.copy_(outputs + prompt)
    return tables


def make_logits(vocab: int) -> Tensor:
    logits = torch.randn(NUM_ROWS, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits[2, : vocab // 2] = -math.inf
    return logits


def check_noise(device: torch.device) -> None:
    seed, position = torch.tensor([5, -7, 1 << 62]), torch.tensor([0, 9, 70_000])
    ids = torch.randint(0, 152_000, (3, 130), generator=torch.Generator().manual_seed(0))
    noise = gumbel_at(seed.to(device), position.to(device), ids.to(device)).cpu()
    torch.testing.assert_close(noise, gumbel_at_reference(seed, position, ids), atol=3e-6, rtol=0)


def check_penalties(vocab: int, vocab_start: int, device: torch.device) -> None:
    logits = make_logits(vocab)
    expected = apply_penalties_reference(
        logits, SLOTS, POSITIONS, make_tables(vocab, vocab_start, False, CPU)
    )
    tables = make_tables(vocab, vocab_start, False, device)
    altered = apply_penalties_kernel(
        logits.to(device), SLOTS.to(device), POSITIONS.to(device), tables
    )
    assert torch.equal(altered.cpu(), expected)


def check_masks(vocab: int, vocab_start: int, device: torch.device) -> None:
    logits = make_logits(vocab)
    logits[:2, ::5] = torch.tensor([[math.nan], [math.inf]])
    results = []
    for place in (CPU, device):
        choices = make_tables(vocab, vocab_start, False, place).choices
        random_bytes = torch.randint(
            0, 256, choices.masks.shape, generator=torch.Generator().manual_seed(vocab)
        )
        choices.masks.copy_(random_bytes)
        results.append(choices)
    expected = apply_mask_reference(logits, SLOTS, results[0])
    assert 0 < int((expected == -math.inf).sum()) < expected.numel()
    masked = apply_mask_kernel(logits.to(device), SLOTS.to(device), results[1].masks)
    assert torch.equal(masked.cpu().view(torch.int32), expected.view(torch.int32))


def check_best(
    vocab: int, vocab_start: int, all_greedy: bool, bounded: bool, device: torch.device
) -> None:
    logits = make_logits(vocab)
    tables = make_tables(vocab, vocab_start, all_greedy, device)
    bounds = device_bounds = None
    if bounded:
        low, high = (
            torch.tensor([1.0, 2.0, -1.0, 0.5, 8.0]),
            torch.tensor([9.0, 3.0, 1.0, 99.0, 8.0]),
        )
        bounds, device_bounds = Bounds(low, high), Bounds(low.to(device), high.to(device))
    raw = logits + 1.0
    rows = make_tables(vocab, vocab_start, all_greedy, CPU).rows(SLOTS)
    scaled = scale_logits(logits, rows, all_greedy)
    expected = best_reference(scaled, raw, rows, POSITIONS, vocab_start, bounds, all_greedy, True)
    for with_stats in (True, False):
        packed = gumbel_argmax(
            logits.to(device),
            raw.to(device),
            SLOTS.to(device),
            POSITIONS.to(device),
            tables,
            device_bounds,
            all_greedy,
            with_stats,
        )
        record = BestRecord(packed.cpu())
        torch.testing.assert_close(record.value, expected.value, atol=1e-5, rtol=0)
        assert torch.equal(record.token_id, expected.token_id)
        assert torch.equal(record.raw, expected.raw)
        if with_stats:
            assert torch.equal(record.raw_max, expected.raw_max)
            torch.testing.assert_close(record.raw_sum, expected.raw_sum, atol=0, rtol=1e-5)


def check_narrow_logits(dtype: torch.dtype, device: torch.device) -> None:
    """Logits of 16 bits give the records that they give in float32."""
    narrow = make_logits(5000).to(dtype).to(device)
    tables = make_tables(5000, 8, False, device)
    slots, positions = SLOTS.to(device), POSITIONS.to(device)
    records = [
        gumbel_argmax(logits, logits, slots, positions, tables, None, False, True)
        for logits in (narrow, narrow.float())
    ]
    assert torch.equal(*records)


def check_broken_rows(device: torch.device) -> None:
    """A NaN or +inf logit anywhere makes the row's value infinite; among equals the lowest id."""
    logits = torch.zeros(NUM_ROWS, 5000)
    logits[0, 4321], logits[1, 17], logits[2] = math.nan, math.inf, -math.inf
    logits[3, [4500, 140, 4999]] = 2.0
    tables = make_tables(5000, 8, True, device)
    on_device, slots, positions = logits.to(device), SLOTS.to(device), POSITIONS.to(device)
    packed = gumbel_argmax(on_device, on_device, slots, positions, tables, None, True, True)
    record = BestRecord(packed.cpu())
    assert record.value.isfinite().tolist() == [False, False, False, True, True]
    assert record.token_id[3:].tolist() == [148, 8]


def check_masses(vocab: int, device: torch.device) -> None:
    scaled = make_logits(vocab)
    scaled[0, :3] = torch.tensor([0.0, -0.0, 0.0])
    overall_max = scaled.amax(dim=1)
    expected = fixed_mass_reference(scaled, overall_max)
    masses = fixed_mass_kernel(scaled.to(device), overall_max.to(device)).cpu()
    assert (masses - expected).abs().max() < 1e-5 * (1 << MASS_BITS)
    least = torch.tensor([-math.inf, 0.0, -3.0, 0.5, -1.0])
    for limit in (None, overall_max):
        prefix = torch.zeros(NUM_ROWS, dtype=torch.int32)
        for shift in (24, 16, 8, 0):
            wanted = digit_sums_reference(scaled, least, limit, prefix, shift)
            sums = digit_sums_kernel(
                scaled.to(device),
                least.to(device),
                None if limit is None else limit.to(device),
                prefix.to(device),
                shift,
            ).cpu()
            assert (sums > 0).equal(wanted > 0)
            tolerance = 0.0 if limit is None else 1e-5 * wanted.max().item()
            assert (sums - wanted).abs().max() <= tolerance
            prefix |= wanted.argmax(dim=1).to(torch.int32) << shift


def check_all(device: torch.device) -> None:
    check_noise(device)
    check_broken_rows(device)
    for dtype in (torch.bfloat16, torch.float16):
        check_narrow_logits(dtype, device)
    # A shard from 0, one whose first id begins no group of four, one smaller than a block.
    for vocab, vocab_start in ((4200, 0), (701, 1346), (64, 640)):
        check_penalties(vocab, vocab_start, device)
        check_masks(vocab, vocab_start, device)
        check_masses(vocab, device)
        for all_greedy in (False, True):
            check_best(vocab, vocab_start, all_greedy, False, device)
            check_best(vocab, vocab_start, all_greedy, True, device)
