"""Runs the one-shot kernel under Triton's interpreter; started by test_allreduce_kernels.py.

Each virtual rank is a process; their staging memories lie in one shared mapping, which each maps
at an address of its own, as GPUs do. Arguments: world size.
"""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import sys
import threading
from multiprocessing.process import BaseProcess

import torch

from tests.unit.tpcomm.cases import expected_reduction, make_input
from tpcomm import ReduceOp
from tpcomm.allreduce_kernels import CHUNK_BYTES, StagingTables, one_shot_all_reduce
from tpcomm.communicator import REDUCIBLE_DTYPES

NUM_CHUNKS = 3
FLAGS_BYTES = 4096
RANK_BYTES = FLAGS_BYTES + 2 * NUM_CHUNKS * CHUNK_BYTES


def make_tables(fd: int, rank: int, world_size: int) -> tuple[StagingTables, mmap.mmap]:
    mapping = mmap.mmap(fd, world_size * RANK_BYTES)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    tables = StagingTables(
        bases=torch.tensor([base + r * RANK_BYTES for r in range(world_size)]),
        epochs=torch.zeros(NUM_CHUNKS, dtype=torch.int64),
        abort_word=torch.zeros(1, dtype=torch.int32),
        rank=rank,
        slots_offset=FLAGS_BYTES,
        slot_bytes=NUM_CHUNKS * CHUNK_BYTES,
    )
    return tables, mapping


def sweep(fd: int, rank: int, world_size: int) -> None:
    """Every dtype and operation over sizes that use one, some and all chunks, whole or ragged."""
    tables, _mapping = make_tables(fd, rank, world_size)
    for dtype in REDUCIBLE_DTYPES:
        exact = dtype == torch.bfloat16  # the interpreter cuts to bfloat16 where a GPU rounds
        chunk = CHUNK_BYTES // dtype.itemsize
        for num_elements in (1, 333, chunk, 2 * chunk + 8, 3 * chunk):
            for op in ReduceOp:
                inputs = [make_input(r, (num_elements,), dtype, exact) for r in range(world_size)]
                tensor = inputs[rank].clone()
                assert one_shot_all_reduce(tensor, op, tables) is tensor
                expected = expected_reduction(inputs, op)
                assert torch.equal(tensor, expected), (dtype, num_elements, op)
    unaligned = torch.ones(65)[1:]
    one_shot_all_reduce(unaligned, ReduceOp.SUM, tables)
    assert torch.equal(unaligned, torch.full((64,), float(world_size)))


def abort_frees_a_waiting_kernel() -> None:
    """No peer ever comes; the abort word, written from another thread, ends the wait."""
    with open(os.memfd_create("test"), "r+b") as file:
        file.truncate(2 * RANK_BYTES)
        tables, _mapping = make_tables(file.fileno(), 0, 2)
        timer = threading.Timer(0.3, lambda: tables.abort_word.fill_(1))
        timer.start()
        one_shot_all_reduce(torch.ones(5), ReduceOp.SUM, tables)
        assert int(tables.abort_word) == 1, "the kernel did not wait for its peer"
        timer.join(10)


def main() -> None:
    world_size = int(sys.argv[1])
    context = multiprocessing.get_context("fork")
    fd = os.memfd_create("test")
    os.ftruncate(fd, world_size * RANK_BYTES)
    ranks: list[BaseProcess] = [
        context.Process(target=sweep, args=(fd, rank, world_size)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(80)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world_size, codes
    abort_frees_a_waiting_kernel()


if __name__ == "__main__":
    main()
