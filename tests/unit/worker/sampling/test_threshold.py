from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.helpers.thread_comm import ThreadCommunicator, run_ranks
from worker.sampling import SlotParams, SlotSampling, threshold
from worker.sampling.fixed_point import MASS_BITS, fixed_mass, nucleus_target


def kept_from(scaled: Tensor, params: SlotParams, world_size: int = 1) -> list[float]:
    """The threshold of every row of `scaled` [N, V] under one set of parameters."""
    tables = SlotSampling(2, 1, 0, torch.device("cpu"))
    tables.set_rows([1], [params])

    def one_rank(comm: ThreadCommunicator) -> Tensor:
        rows = tables.rows(torch.ones(scaled.shape[0], dtype=torch.int64))
        shard = scaled.tensor_split(world_size, dim=1)[comm.rank].contiguous()
        overall_max = threshold.overall_maximum(shard, comm)
        return threshold.kept_from(shard, rows, overall_max, comm, True, True)

    results = run_ranks(world_size, one_rank)
    assert all(torch.equal(result, results[0]) for result in results)
    values: list[float] = results[0].tolist()
    return values


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2, 100, 700, 999])
def test_top_k_threshold_is_the_kth_largest_value(top_k: int, world_size: int) -> None:
    scaled = torch.randn(3, 1000, generator=torch.Generator().manual_seed(top_k)) * 9
    expected = scaled.sort(dim=1, descending=True).values[:, top_k - 1].tolist()
    assert kept_from(scaled, SlotParams(1.0, top_k=top_k), world_size) == expected


def test_top_k_beyond_the_tokens_keeps_all_but_the_masked() -> None:
    scaled = torch.tensor([[-math.inf, 3.0, -8.0, 0.0]])
    assert kept_from(scaled, SlotParams(1.0, top_k=1000)) == [-8.0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_threshold_is_the_least_value_of_the_nucleus(top_p: float, world_size: int) -> None:
    scaled = torch.randn(3, 1000, generator=torch.Generator().manual_seed(7)) * 2
    best = scaled.sort(dim=1, descending=True).values
    reached = torch.softmax(best.double(), dim=1).cumsum(dim=1)
    last = (reached < top_p).sum(dim=1, keepdim=True)
    assert (
        kept_from(scaled, SlotParams(1.0, top_p=top_p), world_size)
        == best.gather(1, last)[:, 0].tolist()
    )


def test_top_p_is_of_what_min_p_and_top_k_leave() -> None:
    scaled = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]
    assert kept_from(scaled, SlotParams(1.0, top_p=0.65)) == [scaled[0, 1].item()]
    # Of the two that top_k leaves, 0.4 / 0.7 < 0.65; of the three that min_p leaves, 0.7 / 0.9.
    assert kept_from(scaled, SlotParams(1.0, top_p=0.55, top_k=2)) == [scaled[0, 0].item()]
    assert kept_from(scaled, SlotParams(1.0, top_p=0.8, min_p=0.4)) == [scaled[0, 2].item()]


def test_zeros_of_both_signs_are_one_value() -> None:
    scaled = torch.tensor([[0.0, -0.0, 1.0, -0.0, -1.0]])
    assert kept_from(scaled, SlotParams(1.0, top_k=2)) == [0.0]


def test_masses_are_exact_up_to_half_a_unit_and_a_maximum_is_one() -> None:
    scaled = torch.tensor([[5.0, 5.0 - math.log(2), -90.0, -math.inf]])
    mass = fixed_mass(scaled, torch.tensor([5.0]))[0].tolist()
    assert mass[0] == 1 << MASS_BITS
    assert mass[1] == pytest.approx(1 << (MASS_BITS - 1), rel=1e-6)
    assert mass[2:] == [0, 0]


def test_nucleus_target_is_at_least_one_unit_and_at_most_everything() -> None:
    total = torch.tensor([1000, 1000, 1000, 0])
    top_p = torch.tensor([0.0, 0.5, 1.0, 0.5])
    assert nucleus_target(top_p, total).tolist() == [1, 500, 1000, 0]
