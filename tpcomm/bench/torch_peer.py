"""torch's symmetric-memory all-reduce, timed in the same way beside ours."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tpcomm.bench.cases import Row
from tpcomm.bench.measure import graph_microseconds
from tpcomm.bench.rank_pool import RankContext

ENVIRONMENT = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
_LIMIT = datetime.timedelta(seconds=30)


def time_torch(context: RankContext, store_path: str, sizes: Sequence[int]) -> list[Row]:
    """us per call of torch's one-shot and two-shot, bf16, for each size in bytes."""
    import torch.distributed._symmetric_memory as symm_mem

    comm = context.join()
    dist.init_process_group(
        "nccl",
        init_method=f"file://{store_path}",
        rank=context.rank,
        world_size=context.world_size,
        timeout=_LIMIT,
        device_id=context.device,
    )
    group = dist.group.WORLD
    assert group is not None
    name = group.group_name
    most = max(sizes) // 2
    buffer = symm_mem.empty(most, dtype=torch.bfloat16, device=context.device)
    symm_mem.rendezvous(buffer, name)
    buffer.zero_()
    one_shot = torch.ops.symm_mem.one_shot_all_reduce_out
    two_shot = torch.ops.symm_mem.two_shot_all_reduce_
    rows: list[Row] = []
    for num_bytes in sizes:
        tensor = buffer[: num_bytes // 2]
        out = torch.empty(num_bytes // 2, dtype=torch.bfloat16, device=context.device)
        calls = {
            "torch_one_shot_us": functools.partial(one_shot, tensor, "sum", name, out),
            "torch_two_shot_us": functools.partial(two_shot, tensor, "sum", name),
        }
        row: Row = {"bytes": num_bytes}
        for what, call in calls.items():
            row[what] = graph_microseconds(comm, call)
        rows.append(row)
    return rows
