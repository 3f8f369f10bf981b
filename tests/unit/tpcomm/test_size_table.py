"""Tables: looking up, switching paths off, and building them from times."""

from __future__ import annotations

import math

import pytest

from tpcomm.path_times import build_table, sizes_of
from tpcomm.size_table import (
    ADD_RMS_NORM,
    ALL_GATHER,
    ALL_REDUCE,
    NCCL,
    ONE_SHOT,
    TWO_SHOT,
    Route,
    SizeTable,
    unmeasured_table,
)

SMALL, LARGE = Route(ALL_REDUCE, 100, ONE_SHOT), Route(ALL_REDUCE, 1000, TWO_SHOT)


@pytest.mark.parametrize(
    ("num_bytes", "path"),
    [(1, ONE_SHOT), (100, ONE_SHOT), (101, TWO_SHOT), (1000, TWO_SHOT), (1001, NCCL)],
)
def test_a_route_serves_up_to_its_size(num_bytes: int, path: str) -> None:
    table = SizeTable([LARGE, SMALL])
    assert table.path(ALL_REDUCE, num_bytes, NCCL) == path
    assert table.path(ALL_GATHER, num_bytes, NCCL) == NCCL


def test_sizes_of_a_path_that_is_off_go_to_the_next() -> None:
    table = SizeTable([SMALL, LARGE, Route(ALL_GATHER, 50, ONE_SHOT)]).without(ALL_REDUCE, ONE_SHOT)
    assert table.path(ALL_REDUCE, 1, NCCL) == TWO_SHOT
    assert table.path(ALL_GATHER, 1, NCCL) == ONE_SHOT


def test_the_fastest_path_of_a_size_serves_it() -> None:
    table = build_table(
        {
            (ALL_REDUCE, ONE_SHOT): {8: 1.0, 16: 2.0, 32: 4.0, 64: 8.0},
            (ALL_REDUCE, TWO_SHOT): {8: 2.0, 16: 2.5, 32: 3.0, 64: 4.0},
            (ALL_REDUCE, NCCL): {8: 9.0, 16: 9.0, 32: 9.0, 64: 3.0},
        }
    )
    assert table.describe().startswith("all_reduce: one_shot to 16, two_shot to 32, nccl to 64;")


def test_noise_does_not_change_the_path() -> None:
    times = {8: 1.0, 16: 1.0, 32: 1.0}
    noisy = {8: 1.1, 16: 0.98, 32: 1.1}
    table = build_table({(ALL_REDUCE, ONE_SHOT): times, (ALL_REDUCE, TWO_SHOT): noisy})
    assert table.routes == (Route(ALL_REDUCE, 32, ONE_SHOT),)


def test_size_that_no_path_was_timed_at_has_no_route() -> None:
    table = build_table({(ADD_RMS_NORM, "fused"): {8: 1.0, 16: math.inf}})
    assert table.routes == (Route(ADD_RMS_NORM, 8, "fused"),)


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_table_before_measurement_stays_within_staging(world_size: int) -> None:
    for limit in (2048, 1 << 20, 4 << 20):
        table = unmeasured_table(world_size, limit)
        assert all(route.max_bytes <= limit for route in table.routes)
        assert table.path(ALL_REDUCE, limit + 1, NCCL) == NCCL


def test_timed_sizes_fit_the_path() -> None:
    assert sizes_of(ALL_REDUCE, 4 << 20, 8192)[-1] == 4 << 20
    assert sizes_of(ADD_RMS_NORM, 20_000, 8192) == [8192, 16384]
    assert sizes_of(ALL_GATHER, 100, 8192) == []
