"""Measures which kernel is the fastest for each product of a model, on the model's own weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpcomm.graph_timer import graph_microseconds
from worker.kernels.linear_tile import ROW_BUCKETS, LinearTile, tiles_for
from worker.kernels.norm import rms_norm
from worker.linear_table import LinearCase, LinearTable
from worker.weight_layout import TransformerWeights

_CALLS = 24
_READ_BYTES = 1 << 30  # by the calls of a graph: many times an L2 cache
_LIMIT_S = 30.0
_WORTH_IT = 0.97  # less of a gain may be noise, and would make starts choose differently


@dataclass(frozen=True)
class Measured:
    """What is chosen for a case, None for the vendor's kernel, and both times in microseconds, each
    with the norm before it."""

    tile: LinearTile | None
    vendor_us: float
    tile_us: float


@dataclass(frozen=True)
class Matrix:
    """One matrix of every layer: one after another they are read from memory, as in a step."""

    name: str
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    is_gated: bool = False

    def cases(self) -> Iterator[LinearCase]:
        """One for each number of rows that is measured."""
        out_size, in_size = self.weights[0].shape
        for num_rows in ROW_BUCKETS:
            yield LinearCase(num_rows, out_size, in_size, self.weights[0].dtype, self.is_gated)

    def call(self, table: LinearTable, num_rows: int) -> Callable[[], Tensor]:
        """A product with the next of the weights at each call."""
        x = self.ones(num_rows)
        weights = itertools.cycle(self.weights)
        apply = table.gated_linear if self.is_gated else table.linear
        return lambda: apply(x, next(weights), self.bias)

    def ones(self, num_rows: int) -> Tensor:
        """What a product takes: [num_rows, in_size]."""
        first = self.weights[0]
        return torch.ones(num_rows, first.shape[1], dtype=first.dtype, device=first.device)

    @property
    def num_calls(self) -> int:
        """All layers where they are small, and not many where they are large."""
        most = max(len(self.weights), _CALLS)
        return min(most, max(2, _READ_BYTES // self.weights[0].nbytes))


# Microseconds of a product of so many rows with a matrix by a table.
Timer = Callable[[Matrix, LinearTable, int], float]


def matrices(weights: TransformerWeights) -> list[Matrix]:
    """All that a step multiplies with; gate_up before its gated form, which may build on it."""
    layers, first = weights.layers, weights.layers[0]
    gate_up = tuple(layer.gate_up for layer in layers)
    return [
        Matrix("qkv", tuple(layer.qkv for layer in layers), first.qkv_bias),
        Matrix("o", tuple(layer.o for layer in layers), first.o_bias),
        Matrix("gate_up", gate_up, first.gate_up_bias),
        Matrix("gate_up, gated", gate_up, first.gate_up_bias, is_gated=True),
        Matrix("down", tuple(layer.down for layer in layers), first.down_bias),
        Matrix("lm_head", (weights.lm_head,), None),
    ]


def measure(
    found: Sequence[Matrix],
    known: Mapping[LinearCase, Measured],
    timer: Timer,
) -> dict[LinearCase, Measured]:
    """A choice for every case of `found`: the known one, or the fastest now."""
    chosen: dict[LinearCase, Measured] = {}
    for matrix in found:
        for case in matrix.cases():
            if case not in chosen:
                table = table_of(chosen)
                chosen[case] = known.get(case) or _fastest(matrix, case, table, timer)
    return chosen


def table_of(chosen: Mapping[LinearCase, Measured]) -> LinearTable:
    """The table of these choices."""
    tiles = {case: one.tile for case, one in chosen.items() if one.tile is not None}
    return LinearTable(tiles)


def graph_timer(matrix: Matrix, table: LinearTable, num_rows: int) -> float:
    """The timer of a GPU, by a replayed graph. Raises CommTimeout if the device does not answer.

    A norm comes before each product, as in a step: else each would be launched into the end of the
    product before, which makes others the fastest.
    """
    product, x = matrix.call(table, num_rows), matrix.ones(num_rows)

    def behind_norm() -> None:
        rms_norm(x, x[0], 1e-5)
        product()

    return graph_microseconds(behind_norm, matrix.num_calls, _LIMIT_S, replays=1)


def _fastest(matrix: Matrix, case: LinearCase, table: LinearTable, timer: Timer) -> Measured:
    def time(tile: LinearTile | None) -> float:
        tiles = dict(table.tiles)
        if tile is not None:
            tiles[case] = tile
        return timer(matrix, LinearTable(tiles), case.num_rows)

    vendor_us = time(None)
    times = {tile: time(tile) for tile in tiles_for(case.num_rows, case.in_size, case.is_gated)}
    if not times:
        return Measured(None, vendor_us, vendor_us)
    best = min(times, key=lambda tile: times[tile])
    is_faster = times[best] < _WORTH_IT * vendor_us
    return Measured(best if is_faster else None, vendor_us, times[best])
