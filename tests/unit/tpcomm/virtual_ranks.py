"""Ranks as processes under Triton's interpreter, with the staging memory of all in one mapping.

Each process maps it at an address of its own, as GPUs do.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tpcomm.staging_tables import CHUNK_BYTES, StagingTables, make_tables, staging_size

NUM_CHUNKS = 3
SLOT_BYTES = NUM_CHUNKS * CHUNK_BYTES
LIMIT_S = 90
_mappings: list[mmap.mmap] = []  # the tables hold addresses only


def interpreted_tables(fd: int, rank: int, world_size: int) -> StagingTables:
    rank_bytes = staging_size(world_size, SLOT_BYTES)
    mapping = mmap.mmap(fd, world_size * rank_bytes)
    _mappings.append(mapping)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    tables = make_tables(world_size, rank, SLOT_BYTES, torch.device("cpu"))
    tables.bases.copy_(torch.tensor([base + r * rank_bytes for r in range(world_size)]))
    return tables


def fresh_memory(world_size: int) -> int:
    """A file of staging memory for all ranks, all ones."""
    fd = os.memfd_create("test")
    os.write(fd, b"\xff" * (world_size * staging_size(world_size, SLOT_BYTES)))
    return fd


def yield_while_polling() -> None:
    """Volatile loads give the core away: there are more ranks than cores, and they spin."""
    load: Any = InterpreterBuilder.create_masked_load

    def create_masked_load(builder: Any, *arguments: Any) -> Any:
        if arguments[-1]:  # is_volatile
            os.sched_yield()
        return load(builder, *arguments)

    setattr(InterpreterBuilder, "create_masked_load", create_masked_load)  # noqa: B010


def clock_of_the_host() -> None:
    """The interpreter has no inline assembly, and the kernels' only one reads the clock."""

    class Result:
        def get_result(self, index: int) -> TensorHandle:
            return TensorHandle(np.array([time.monotonic_ns()], dtype=np.int64), tl.int64)

    def create_inline_asm(builder: Any, assembly: str, *arguments: Any) -> Result:
        assert "%globaltimer" in assembly, assembly
        return Result()

    setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)  # noqa: B010


def run_virtual_ranks(body: Callable[[StagingTables], None], world_size: int) -> None:
    """`body(tables)` on every rank, in processes of their own; AssertionError if one fails."""
    fd = fresh_memory(world_size)
    context = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        yield_while_polling()
        clock_of_the_host()
        body(interpreted_tables(fd, rank, world_size))

    ranks: list[BaseProcess] = [
        context.Process(target=run, args=(rank,)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_S)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    os.close(fd)
    assert codes == [0] * world_size, codes
