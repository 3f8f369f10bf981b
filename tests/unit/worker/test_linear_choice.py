"""Choices of kernels: the fastest wins, what was measured is kept, a bad file is only ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from worker.kernels.linear_tile import ROW_BUCKETS, LinearTile, tiles_for
from worker.linear_choice import describe
from worker.linear_file import Origin, keep_choices, read_choices
from worker.linear_table import LinearCase, LinearTable, row_bucket
from worker.linear_timing import Matrix, Measured, measure, table_of

ORIGIN = Origin("a GPU", "2.11.0", "3.6.0", "digest")
FAST = tiles_for(16, 4096, is_gated=True)[1]


@dataclass
class FakeTimer:
    """Vendor 10 us; every variant 12 us but `fast`, for 16 rows. Notes what it was asked."""

    fast_us: float = 5.0
    fast: LinearTile = FAST
    asked: list[LinearCase] = field(default_factory=list)

    def __call__(self, matrix: Matrix, table: LinearTable, num_rows: int) -> float:
        out_size, in_size = matrix.weights[0].shape
        case = LinearCase(num_rows, out_size, in_size, torch.bfloat16, matrix.is_gated)
        self.asked.append(case)
        tile = table.tiles.get(case)
        if tile is None:
            return 10.0
        return self.fast_us if tile == self.fast else 12.0


def matrix(out_size: int = 96, in_size: int = 4096, is_gated: bool = False) -> Matrix:
    weight = torch.empty(out_size, in_size, dtype=torch.bfloat16, device="meta")
    return Matrix("m", (weight,), None, is_gated)


def case(num_rows: int = 16, out_size: int = 96, is_gated: bool = False) -> LinearCase:
    return LinearCase(num_rows, out_size, 4096, torch.bfloat16, is_gated)


def test_the_fastest_variant_is_chosen_where_it_beats_the_vendor() -> None:
    chosen = measure([matrix(), matrix(is_gated=True)], {}, FakeTimer())
    assert chosen[case()] == chosen[case(is_gated=True)] == Measured(FAST, 10.0, 5.0)
    assert chosen[case(1)] == Measured(None, 10.0, 12.0)
    assert table_of(chosen).tiles == {case(): FAST, case(is_gated=True): FAST}


def test_a_gain_that_may_be_noise_is_none() -> None:
    chosen = measure([matrix()], {}, FakeTimer(fast_us=9.9))
    assert chosen[case()] == Measured(None, 10.0, 9.9)


def test_known_and_repeated_shapes_are_not_measured() -> None:
    timer = FakeTimer()
    known = {case(num_rows): Measured(None, 1.0, 2.0) for num_rows in ROW_BUCKETS}
    found = [matrix(), matrix(64), matrix(64)]
    assert measure(found, known, timer).items() >= known.items()
    assert {one.out_size for one in timer.asked} == {64}
    tries = [1 + len(tiles_for(num_rows, 4096, False)) for num_rows in ROW_BUCKETS]
    assert len(timer.asked) == sum(tries)


def test_rows_that_are_not_aligned_keep_the_vendors_kernel() -> None:
    timer = FakeTimer()
    chosen = measure([matrix(in_size=4104)], {}, timer)
    assert all(one.tile is None for one in chosen.values())
    assert len(timer.asked) == len(ROW_BUCKETS)


def test_a_table_takes_the_bucket_that_covers_the_rows() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 8, 9, 33, 65)] == [1, 8, 8, 16, 64, None]
    x = torch.ones(9, 32)
    weight = torch.ones(4, 32)
    # No case of float32 is in the table: the vendor's kernel answers, on any device.
    table = LinearTable({LinearCase(16, 4, 32, torch.bfloat16): FAST})
    assert torch.equal(table.linear(x, weight, None), torch.full((9, 4), 32.0))


def test_choices_are_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "not yet there"
    chosen = measure([matrix(), matrix(is_gated=True)], {}, FakeTimer())
    assert keep_choices(folder, ORIGIN, chosen) == chosen
    assert read_choices(folder, ORIGIN) == chosen
    assert [path.name[:8] for path in folder.iterdir()] == ["linears-"]


def test_what_another_rank_wrote_first_holds(tmp_path: Path) -> None:
    first = {case(): Measured(FAST, 10.0, 5.0)}
    keep_choices(tmp_path, ORIGIN, first)
    late = {case(): Measured(None, 10.0, 11.0), case(1): Measured(None, 1.0, 2.0)}
    assert keep_choices(tmp_path, ORIGIN, late) == late | first
    assert read_choices(tmp_path, ORIGIN) == late | first


@pytest.mark.parametrize("name", ["device", "torch", "triton", "kernels"])
def test_choices_of_another_origin_are_not_found(tmp_path: Path, name: str) -> None:
    keep_choices(tmp_path, ORIGIN, {case(): Measured(FAST, 10.0, 5.0)})
    assert read_choices(tmp_path, replace(ORIGIN, **{name: "other"})) == {}


def spoil_origin(text: str) -> str:
    return text.replace("a GPU", "another GPU")


def spoil_tile(text: str) -> str:
    content = json.loads(text)
    content["cases"][0]["tile"]["block_n"] = 7
    return json.dumps(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:50],
        lambda text: "[1]",
        lambda text: "{}",
        spoil_origin,
        spoil_tile,
        lambda text: text.replace('"bfloat16"', '"no dtype"'),
        lambda text: text.replace('"block_n"', '"else"'),
    ],
)
def test_a_file_that_is_not_ours_is_named_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[str], str]
) -> None:
    keep_choices(tmp_path, ORIGIN, {case(): Measured(FAST, 10.0, 5.0)})
    path = ORIGIN.path(tmp_path)
    path.write_text(spoil(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert read_choices(tmp_path, ORIGIN) == {}
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_made_is_only_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    choices = {case(): Measured(FAST, 10.0, 5.0)}
    assert keep_choices(in_the_way / "folder", ORIGIN, choices) == choices
    assert str(in_the_way) in caplog.text


def test_the_log_says_both_times() -> None:
    chosen = measure([matrix()], {}, FakeTimer())
    [line] = describe([matrix()], chosen)
    assert "m [96x4096]" in line and "10.0 us" in line and "5.0 us" in line
