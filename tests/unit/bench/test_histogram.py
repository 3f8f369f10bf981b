"""Quantiles from bins that many processes have filled."""

from __future__ import annotations

import math

import pytest

from bench.histogram import LogHistogram, p99


def test_quantiles_are_within_a_bin_of_the_exact_ones() -> None:
    histogram = LogHistogram()
    values = [1e-4 * 1.01**n for n in range(1000)]
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.99):
        exact = values[int(share * len(values)) - 1]
        assert exact <= histogram.quantile(share) * 1.001
        assert histogram.quantile(share) <= exact * 1.07


def test_two_halves_merge_into_the_whole() -> None:
    whole, half, other = LogHistogram(), LogHistogram(), LogHistogram()
    for n in range(1, 200):
        whole.add(n / 1e3)
        (half if n % 2 else other).add(n / 1e3)
    half.merge(LogHistogram(other.counts))
    assert half.counts == whole.counts
    assert half.total == 199


def test_values_outside_lie_in_the_outer_bins_and_none_gives_no_number() -> None:
    histogram = LogHistogram()
    assert math.isnan(histogram.quantile(0.5))
    histogram.add(-1.0)
    histogram.add(1e9, count=3)
    assert histogram.counts[0] == 1
    assert histogram.counts[-1] == 3


def test_bins_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="3 bins"):
        LogHistogram([1, 2, 3])


def test_p99_is_a_value_that_occurred() -> None:
    assert p99([float(value) for value in range(200, 0, -1)]) == 198.0
    assert p99([2.0, 1.0]) == 2.0
    assert math.isnan(p99([]))
