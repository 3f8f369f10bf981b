"""Quantiles: of a list, and of times in bins, so that many client processes can be added up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Self

_LOWEST_S = 1e-5
_BINS_PER_DECADE = 40
_NUM_BINS = 8 * _BINS_PER_DECADE  # 10 us to 1000 s, 6% a bin


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99% of the values do not exceed; NaN without any."""
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1] if ordered else math.nan


class LogHistogram:
    """Seconds in logarithmic bins; quantiles are exact to 6%. For one thread."""

    def __init__(self, counts: Iterable[int] = ()) -> None:
        self.counts = list(counts) or [0] * _NUM_BINS
        if len(self.counts) != _NUM_BINS:
            raise ValueError(f"{len(self.counts)} bins, not {_NUM_BINS}")

    @property
    def total(self) -> int:
        """Values added."""
        return sum(self.counts)

    def add(self, seconds: float, count: int = 1) -> None:
        """Counts a value `count` times; what lies outside goes into the first or last bin."""
        position = math.log10(max(seconds, _LOWEST_S) / _LOWEST_S) * _BINS_PER_DECADE
        self.counts[min(int(position), _NUM_BINS - 1)] += count

    def merge(self, other: Self) -> None:
        """Adds what another one has counted."""
        self.counts = [
            ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True)
        ]

    def quantile(self, share: float) -> float:
        """The upper edge of the bin below which `share` of the values lie; NaN without any."""
        wanted = share * self.total
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return float(_LOWEST_S * 10 ** ((index + 1) / _BINS_PER_DECADE))
        return math.nan
