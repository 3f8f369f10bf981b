"""Reads rectangles of checkpoint tensors, and nothing around them, into place.

Row slices are one run of the file. Column slices (row-parallel weights) are one short run per
row, each read on its own: a read of whole rows would cost world_size times the bytes. Plain reads
rather than a memory map: a map pages in, and counts, what lies between the runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from worker.checkpoint import TensorEntry
from worker.errors import CheckpointError

STAGING_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a tensor; a vector is a single column."""

    row_start: int
    num_rows: int
    col_start: int
    num_cols: int


class SliceReader:
    """Copies rectangles to tensors on one device, through bounded host memory.

    On the CPU, in the checkpoint's dtype, bytes are read straight into the destination. Otherwise
    they pass through two staging buffers (pinned where the device is CUDA), so that reading the
    next rows overlaps with copying the last. Use as a context manager, from one thread.
    """

    def __init__(
        self,
        device: torch.device,
        on_bytes: Callable[[int], None],
        staging_bytes: int = STAGING_BYTES,
    ) -> None:
        self._device = device
        self._on_bytes = on_bytes
        self._staging_bytes = staging_bytes
        self._staging: list[Tensor] = []
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0
        self._files: dict[Path, int] = {}
        self._open = contextlib.ExitStack()
        self.bytes_read = 0

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._open.close()
        self._files.clear()
        self._staging.clear()

    def copy(self, entry: TensorEntry, area: Rectangle, destination: Tensor) -> None:
        """Fill `destination` [num_rows, num_cols] (or [num_rows] of a vector), last dim dense."""
        target = destination if destination.dim() == 2 else destination.unsqueeze(1)
        assert target.shape == (area.num_rows, area.num_cols), (entry.name, target.shape, area)
        if not target.numel():
            return
        if self._device.type == "cpu" and target.dtype == entry.dtype:
            self._read(entry, area, target)
            return
        row_bytes = area.num_cols * entry.dtype.itemsize
        rows_at_once = max(self._staging_bytes // row_bytes, 1)
        for first in range(0, area.num_rows, rows_at_once):
            num_rows = min(rows_at_once, area.num_rows - first)
            part = Rectangle(area.row_start + first, num_rows, area.col_start, area.num_cols)
            self._copy_staged(entry, part, target[first : first + num_rows])

    def _copy_staged(self, entry: TensorEntry, area: Rectangle, target: Tensor) -> None:
        num_bytes = area.num_rows * area.num_cols * entry.dtype.itemsize
        staging = self._next_staging(num_bytes)
        staged = staging[:num_bytes].view(entry.dtype).view(area.num_rows, area.num_cols)
        self._read(entry, area, staged)
        if self._device.type != "cuda":
            target.copy_(staged)
            return
        # The dtype is changed on the device: copy_ between both would convert on the host.
        target.copy_(staged.to(self._device, non_blocking=True), non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))
        self._copied[self._turn] = copied

    def _next_staging(self, num_bytes: int) -> Tensor:
        """The buffer whose last copy is longest ago, waited for."""
        pinned = self._device.type == "cuda"
        if not self._staging or self._staging[0].numel() < num_bytes:
            size = max(num_bytes, self._staging_bytes)
            self._staging = [
                torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(1 + pinned)
            ]
            self._copied, self._turn = [None, None], 0
        self._turn = (self._turn + 1) % len(self._staging)
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()
        return self._staging[self._turn]

    def _read(self, entry: TensorEntry, area: Rectangle, target: Tensor) -> None:
        """Read the rectangle into host memory of the same dtype."""
        item = entry.dtype.itemsize
        full_cols = entry.shape[1] if len(entry.shape) == 2 else 1
        run = area.num_cols * item
        offset = entry.offset + (area.row_start * full_cols + area.col_start) * item
        stride, num_runs = target.stride(0) * item, area.num_rows
        memory = _memory_of(target, (num_runs - 1) * stride + run)
        descriptor = self._descriptor(entry.path)
        if area.num_cols == full_cols and target.is_contiguous():
            for position in range(0, len(memory), self._staging_bytes):
                part = memory[position : position + self._staging_bytes]
                self._read_run(descriptor, part, offset + position, entry)
                self._on_bytes(len(part))
            return
        for row in range(num_runs):
            part = memory[row * stride : row * stride + run]
            self._read_run(descriptor, part, offset + row * full_cols * item, entry)
        self._on_bytes(run * num_runs)

    def _read_run(self, file: int, memory: memoryview, offset: int, entry: TensorEntry) -> None:
        done = 0
        while done < len(memory):
            count = os.preadv(file, [memory[done:]], offset + done)
            if not count:
                raise CheckpointError(
                    f"{entry.path}: tensor {entry.name}: expected bytes up to"
                    f" {offset + len(memory)}, found the end of the file at {offset + done}"
                )
            done += count
            self.bytes_read += count

    def _descriptor(self, path: Path) -> int:
        if path not in self._files:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: expected a readable file, found: {error}"
                ) from error
            self._open.callback(os.close, descriptor)
            self._files[path] = descriptor
        return self._files[path]


def _memory_of(tensor: Tensor, num_bytes: int) -> memoryview:
    """The tensor's bytes from its first element on, gaps between rows included; no copy."""
    return memoryview((ctypes.c_char * num_bytes).from_address(tensor.data_ptr())).cast("B")
