"""Fills this rank's weights, from a checkpoint or with made-up numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from worker.checkpoint import open_checkpoint
from worker.cpu_packing import pack_weights
from worker.dummy_weights import fill_dummy
from worker.models.spec import ModelSpec
from worker.sharding import ShardSpec
from worker.slice_reader import SliceReader
from worker.weight_layout import TransformerWeights, allocate_weights
from worker.weight_plan import Slice, plan_slices, refuse_unread_tensors

LoadFormat = Literal["safetensors", "dummy"]


@dataclass(frozen=True)
class LoadReport:
    """What loading cost. Parameters are this rank's, padding not counted."""

    bytes_read: int  # of tensors, from files
    seconds: float
    num_parameters: int


def load_weights(
    model_dir: Path,
    spec: ModelSpec,
    shard: ShardSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: LoadFormat,
    progress: Callable[[int, int], None],
    pack: bool = False,
) -> tuple[TransformerWeights, LoadReport]:
    """Allocate this rank's weights on `device` and fill them, reading only this rank's slices.

    `pack` reorders the matrices for the CPU afterwards (see cpu_packing; ask `can_pack` first).

    `progress(done_bytes, total_bytes)` counts bytes of the checkpoint (of the weights, for dummy
    ones) and is called from this thread. Raises CheckpointError.
    """
    started = time.monotonic()
    weights = allocate_weights(spec, shard, dtype, device)
    slices = plan_slices(spec, shard, weights)
    if load_format == "dummy":
        bytes_read = _fill_dummies(slices, progress)
    else:
        bytes_read = _read_slices(model_dir, spec, slices, device, progress)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # temporaries of the load would count against the KV cache
    num_parameters = sum(piece.destination.numel() for piece in slices)
    if pack:
        weights = pack_weights(weights)
    return weights, LoadReport(bytes_read, time.monotonic() - started, num_parameters)


def _read_slices(
    model_dir: Path,
    spec: ModelSpec,
    slices: list[Slice],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> int:
    checkpoint = open_checkpoint(model_dir)
    found = [(checkpoint.entry(piece.name, piece.full_shape), piece) for piece in slices]
    refuse_unread_tensors(checkpoint, spec, slices)
    # Check every dtype, and so everything but the bytes, before the first long read.
    total = sum(piece.destination.numel() * entry.dtype.itemsize for entry, piece in found)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    with SliceReader(device, on_bytes) as reader:
        for entry, piece in sorted(found, key=lambda pair: (pair[0].path, pair[0].offset)):
            reader.copy(entry, piece.area, piece.destination)
        return reader.bytes_read


def _fill_dummies(slices: list[Slice], progress: Callable[[int, int], None]) -> int:
    total = sum(piece.destination.nbytes for piece in slices)
    done = 0
    for piece in slices:
        if piece.is_norm:
            piece.destination.fill_(1.0)
        else:
            fill_dummy(piece.destination, piece.name, piece.area)
        done += piece.destination.nbytes
        progress(done, total)
    return 0
