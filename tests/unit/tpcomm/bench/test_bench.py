"""What the bench does around its measurements; CPU processes stand in for ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tpcomm.bench import __main__ as bench_main
from tpcomm.bench.__main__ import Bench, parse_arguments, slowest
from tpcomm.bench.rank_pool import RankContext, RankPool
from tpcomm.bench.report import print_table


def answer(context: RankContext, factor: int) -> int:
    return context.rank * factor


def fail_on_rank_1(context: RankContext) -> None:
    if context.rank == 1:
        raise ValueError("planted error")


def hang_on_rank_1(context: RankContext) -> None:
    if context.rank == 1:
        time.sleep(1000)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RankPool]]:
    """The pools that a Bench makes, of CPU processes."""
    made: list[RankPool] = []

    def make(*arguments: Any) -> RankPool:
        made.append(RankPool(2, b"group", 0, {}, "cpu"))
        return made[-1]

    monkeypatch.setattr(bench_main, "RankPool", make)
    monkeypatch.setattr(bench_main, "create_group_id", lambda backend: b"group")
    yield made
    for pool in made:
        pool.kill()


def test_a_section_that_fails_or_hangs_is_noted_and_the_rest_goes_on(
    pools: list[RankPool],
) -> None:
    bench = Bench(2, limit_s=100.0)
    assert bench.run("sound", answer, 3, limit_s=60) == [0, 3]
    assert bench.run("raises", fail_on_rank_1, limit_s=60) is None
    assert bench.run("sound again", answer, 5, limit_s=60) == [0, 5]
    assert len(pools) == 2
    assert bench.run("hangs", hang_on_rank_1, limit_s=1) is None
    first, second = bench.results["failures"]
    assert "planted error" in first["reason"] and first["what"] == "raises"
    assert second["reason"] == "rank 1: not done within 1 s"


def test_no_section_starts_after_the_total_limit(pools: list[RankPool]) -> None:
    bench = Bench(2, limit_s=0.5)
    assert bench.run("late", answer, 1, limit_s=60) is None
    assert pools == []
    assert bench.results["failures"][0]["reason"] == "the total limit is used up"


def test_slowest_rank_counts_and_one_wrong_rank_is_enough() -> None:
    rows = [{"path": "a", "us": 1.0, "correct": True}, {"path": "a", "us": 2.004, "correct": False}]
    assert slowest(rows) == {"path": "a", "us": 2.0, "correct": False}


def test_table_shows_wrong_results(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", [{"bytes": 8, "us": 1.5, "correct": False}, {"bytes": 16, "us": None}])
    assert capsys.readouterr().out == (
        "\ntitle\nbytes    us  correct\n    8  1.50    WRONG\n   16     -        -\n\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "9"], "needs 2 to 2 GPUs of 2 visible"),
        (["nonsense"], "none of preflight, time"),
        (["--limit-s", "0"], "is not positive"),
    ],
)
def test_bad_arguments_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err
