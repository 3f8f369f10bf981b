"""One pool of rank processes for all tests of tpcomm."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.tpcomm.rank_pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    pool = RankPool(3, "cpu")
    yield pool
    pool.close()
