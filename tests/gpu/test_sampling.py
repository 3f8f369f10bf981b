"""The sampler on a GPU: kernels against references, every variant against the obvious way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.sampling_cases import (
    Row,
    expected_rows,
    make_shard,
    random_rows,
    sample_rows,
    sample_shard,
    slots_of,
    strongest_plan,
    token_ids,
)
from tests.helpers.sampling_kernel_checks import check_all
from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from worker.sampling import (
    SampleOutput,
    SamplePlan,
    SampleVariant,
    SlotParams,
    SlotSampling,
    update_counts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 1 GPU"),
]
CUDA = torch.device("cuda", 0)
CHOICES = ("bias_ids", "bias_values", "prefixes", "last_ids", "recent", "masks")


def make_logits(num_rows: int, vocab_size: int, seed: int) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    # Multiples of 1/8: equal logits are common, as they are with half-precision weights.
    return (logits * 8).round() / 8


def test_every_kernel_equals_its_reference() -> None:
    check_all(CUDA)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", SampleVariant)
def test_every_variant_gives_the_reference_s_tokens(
    variant: SampleVariant, world_size: int
) -> None:
    rows = random_rows(32, 1543, variant, seed=1)
    logits = make_logits(len(rows), 1543, 1)
    expected = [row.token_id for row in expected_rows(logits, rows)]
    for output in sample_rows(logits, rows, world_size, device=CUDA):
        assert token_ids(output) == expected
        assert output.finite.all()


@pytest.mark.parametrize("variant", SampleVariant)
def test_a_row_s_token_is_the_same_bit_for_bit_in_every_variant(variant: SampleVariant) -> None:
    rows = random_rows(256, 32_000, variant, seed=2)
    logits = make_logits(len(rows), 32_000, 2)
    own = token_ids(sample_rows(logits, rows, device=CUDA)[0])
    for stronger in SampleVariant:
        if stronger >= variant:
            output = sample_rows(logits, rows, plan=strongest_plan(stronger), device=CUDA)[0]
            assert token_ids(output) == own, stronger


def test_flat_nucleus_over_a_large_vocabulary_is_exact_at_every_tp_degree() -> None:
    params = SlotParams(temperature=2.0, top_p=0.9)
    rows = [Row(replace(params, seed=seed), position=seed * 3) for seed in range(16)]
    logits = make_logits(16, 151_643, 3) * 0.25
    expected = [row.token_id for row in expected_rows(logits, rows)]
    for world_size in (1, 2, 4):
        for output in sample_rows(logits, rows, world_size, device=CUDA):
            assert token_ids(output) == expected


def test_broken_rows_are_reported_and_harm_no_other() -> None:
    for variant in SampleVariant:
        rows = random_rows(6, 650, variant, seed=9)
        logits = make_logits(6, 650, 9)
        clean = token_ids(sample_rows(logits, rows, device=CUDA)[0])
        logits[1, 3], logits[2, 300], logits[3] = torch.nan, torch.inf, -torch.inf
        plan = strongest_plan(variant, with_logprobs=True)
        for output in sample_rows(logits, rows, 2, plan, CUDA):
            assert output.finite.tolist() == [True, False, False, False, True, True]
            assert token_ids(output) == [clean[0], 0, 0, 0, clean[4], clean[5]]


@pytest.mark.parametrize("variant", SampleVariant)
def test_replay_of_a_captured_step_equals_eager_on_new_inputs(variant: SampleVariant) -> None:
    rows = random_rows(8, 5000, variant, seed=4)
    plan = strongest_plan(variant)
    first, second = make_logits(8, 5000, 4), make_logits(8, 5000, 5)

    def capture_and_replay(comm: ThreadCommunicator) -> list[int]:
        # Row i of the replay has the parameters of slot i + 1, written after the capture.
        shuffled = list(reversed(rows))
        local, tables = make_shard(first, shuffled, 0, 1, CUDA)
        slots = torch.tensor(slots_of(rows), device=CUDA)
        positions = torch.tensor([row.position for row in shuffled], device=CUDA)
        output, graph = _capture(local, tables, slots, positions, plan, comm)
        fresh_local, fresh = make_shard(second, rows, 0, 1, CUDA)
        local.copy_(fresh_local)
        tables.packed.copy_(fresh.packed)
        tables.counts.copy_(fresh.counts)
        for name in CHOICES:
            getattr(tables.choices, name).copy_(getattr(fresh.choices, name))
        positions.copy_(torch.tensor([row.position for row in rows]))
        graph.replay()
        return token_ids(output)

    replayed = run_ranks(1, capture_and_replay)[0]
    assert replayed == token_ids(sample_rows(second, rows, plan=plan, device=CUDA)[0])
    assert replayed == [row.token_id for row in expected_rows(second, rows)]


def _capture(
    local: Tensor,
    tables: SlotSampling,
    slots: Tensor,
    positions: Tensor,
    plan: SamplePlan,
    comm: ThreadCommunicator,
) -> tuple[SampleOutput, torch.cuda.CUDAGraph]:
    active = torch.zeros(slots.shape[0], dtype=torch.bool, device=CUDA)

    def step() -> SampleOutput:
        output = sample_shard(local, tables, slots, positions, plan, comm)
        update_counts(tables, slots, output.token_ids, active)
        return output

    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = step()
    return output, graph


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_never_waits_for_the_device() -> None:
    rows = random_rows(8, 5000, SampleVariant.THRESHOLD, seed=6)
    local, tables = make_shard(make_logits(8, 5000, 6), rows, 0, 1, CUDA)
    slots = torch.tensor(slots_of(rows), device=CUDA)

    def every_variant(comm: ThreadCommunicator) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for variant in SampleVariant:
                plan = strongest_plan(variant, with_logprobs=True)
                sample_shard(local, tables, slots, slots, plan, comm)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run_ranks(1, every_variant)
