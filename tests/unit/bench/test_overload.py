"""The search for the sustainable rate, over a server made of a rule."""

import asyncio
from typing import cast

import pytest

from bench.open_loop import Arrivals, OpenLoop, Outcomes
from bench.overload import _parser, _Runs


class FakeLoop:
    """Refuses a request of every run above `limit` requests a second; 60 s above `long_limit`."""

    def __init__(self, limit: float, long_limit: float) -> None:
        self._limits = {10.0: limit, 60.0: long_limit}
        self.arrivals: list[Arrivals] = []

    async def run(self, arrivals: Arrivals, stop_at_refusal: bool = False) -> Outcomes:
        assert stop_at_refusal
        self.arrivals.append(arrivals)
        is_refused = arrivals.rate > self._limits[arrivals.seconds]
        return Outcomes(num_refused=int(is_refused), num_tokens=1, seconds=1.0)


def search(loop: FakeLoop) -> tuple[float, Outcomes]:
    options = _parser().parse_args(["--model", "x", "--first-rate", "1"])
    return asyncio.run(_Runs(cast(OpenLoop, loop), options).sustainable())


def test_the_sustainable_rate_is_the_highest_that_holds_over_the_whole_time() -> None:
    loop = FakeLoop(limit=4.0, long_limit=2.2)
    rate, full = search(loop)
    # Short runs up to 1.5 ** 4, refused; from 1.5 ** 3 down to the first that holds.
    assert rate == pytest.approx(1.5**3 / 1.25**2)
    assert not full.num_refused
    assert [one.seconds for one in loop.arrivals] == [10.0] * 4 + [60.0] * 3


def test_no_two_runs_send_the_same_prompts() -> None:
    loop = FakeLoop(limit=4.0, long_limit=2.2)
    search(loop)
    assert len({one.seed for one in loop.arrivals}) == len(loop.arrivals)
