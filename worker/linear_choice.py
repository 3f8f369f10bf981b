"""Chooses the kernel of each product once the weights are there: from a file, or by measuring."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from worker.linear_file import keep_choices, origin_of, read_choices
from worker.linear_table import LinearCase, LinearTable
from worker.linear_timing import Matrix, Measured, graph_timer, matrices, measure, table_of
from worker.weight_layout import TransformerWeights

_LOG = logging.getLogger(__name__)


def choose_linears(weights: TransformerWeights, folder: Path) -> LinearTable:
    """The table for these weights on their CUDA device; measurements are kept in `folder`.

    Float32 keeps the vendor's kernels: its products are to be the same at every degree.
    """
    device = weights.embedding.device
    if weights.embedding.dtype is torch.float32:
        return LinearTable({})
    begun = time.monotonic()
    origin, found = origin_of(device), matrices(weights)
    known = read_choices(folder, origin)
    chosen = measure(found, known, graph_timer)
    is_new = not chosen.keys() <= known.keys()
    if is_new:
        held = keep_choices(folder, origin, chosen)
        chosen = {case: held[case] for case in chosen}
    for line in describe(found, chosen):
        _LOG.info("%s", line)
    source = "measured" if is_new else "known"
    took = time.monotonic() - begun
    _LOG.info("kernels of %d products %s in %.1f s", len(chosen), source, took)
    return table_of(chosen)


def describe(found: Sequence[Matrix], chosen: Mapping[LinearCase, Measured]) -> list[str]:
    """A line a matrix: what is chosen for each number of rows, and both times."""
    return [f"{_name(matrix)}: {_choices(matrix, chosen)}" for matrix in found]


def _name(matrix: Matrix) -> str:
    out_size, in_size = matrix.weights[0].shape
    return f"product {matrix.name} [{out_size}x{in_size}]"


def _choices(matrix: Matrix, chosen: Mapping[LinearCase, Measured]) -> str:
    return "; ".join(
        f"{case.num_rows} rows {chosen[case].tile or 'vendor'}"
        f" ({chosen[case].vendor_us:.1f} us vendor, {chosen[case].tile_us:.1f} us own)"
        for case in matrix.cases()
    )
