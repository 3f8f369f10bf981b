"""Checks and times the collectives of this host's GPUs, in the manner of nccl-tests.

Every section runs under a limit of its own; one that hangs or fails is reported and the rest goes
on with fresh processes. Tables go to stdout as they come, and last one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tpcomm.bench import cases, recorder, stress, torch_peer, virtual
from tpcomm.bench.rank_pool import RankPool, RanksFailed
from tpcomm.bench.report import print_table
from tpcomm.factory import create_group_id
from tpcomm.nccl_loader import nccl_environment

_KIB = 1 << 10
SIZES = tuple(8 * _KIB << step for step in range(10))  # 8 KiB to 4 MiB
FUSED_ROWS = (1, 2, 4, 8, 16, 32, 64)
HIDDEN = 4096
STAGING_BYTES = 4 << 20
SECTIONS = (
    "preflight",
    "time",
    "fused",
    "gather",
    "recorder",
    "torch",
    "stress",
    "virtual",
    "check",
    "tune",
)
_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # virtual ranks are streams of one GPU


class Bench:
    """Runs sections over a pool of ranks, which is made anew after a failure."""

    def __init__(self, world_size: int, limit_s: float) -> None:
        self.world_size = world_size
        self.results: dict[str, Any] = {"failures": []}
        self._deadline = time.monotonic() + limit_s
        self._pool: RankPool | None = None

    def run(
        self, what: str, function: Callable[..., Any], *args: Any, limit_s: float
    ) -> list[Any] | None:
        """Results by rank; None, with the reason noted, if it failed or no time is left."""
        left = self._deadline - time.monotonic()
        if left <= 1:
            self.fail(what, "the total limit is used up")
            return None
        try:
            return self._need_pool().run(function, *args, limit_s=min(limit_s, left))
        except RanksFailed as error:
            self._pool = None
            self.fail(what, str(error))
            return None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.kill()

    def fail(self, what: str, reason: str) -> None:
        """Note that something went wrong; the rest goes on."""
        print(f"FAILED {what}: {reason}", flush=True)
        self.results["failures"].append({"what": what, "reason": reason[-2000:]})

    def _need_pool(self) -> RankPool:
        if self._pool is None:
            environment = nccl_environment(os.environ) | _ENVIRONMENT | torch_peer.ENVIRONMENT
            self._pool = RankPool(
                self.world_size, create_group_id("nccl"), STAGING_BYTES, environment
            )
        return self._pool


def slowest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of all ranks': the largest time, right only if right everywhere."""
    merged: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, bool):
            merged[key] = all(values)
        elif isinstance(value, float):
            merged[key] = round(max(values), 2)
        else:
            merged[key] = value
    return merged


def run_preflight(bench: Bench) -> None:
    replies = bench.run("preflight", cases.run_preflight, limit_s=90)
    if replies is None:
        return
    bench.results["preflight"] = replies[0]
    rows = []
    for path in replies[0]["paths"]:
        times = " ".join(f"{num_bytes}:{us:.1f}" for num_bytes, us in path["times"])
        row = {"operation": path["operation"], "path": path["path"], "sound": path["usable"]}
        rows.append({**row, "bytes:us": times or path["detail"]})
    print_table("preflight", rows)
    print("table:", replies[0]["table"], flush=True)
    if any(reply["table"] != replies[0]["table"] for reply in replies):
        bench.fail("preflight", "the ranks have different tables")


def run_check(bench: Bench) -> None:
    replies = bench.run("check", cases.check_all_dtypes, limit_s=120)
    if replies is not None:
        wrong = [text for reply in replies for text in reply]
        bench.results["check"] = wrong or "all paths, dtypes and sizes exact"
        print("check:", bench.results["check"], flush=True)


def run_time(bench: Bench) -> None:
    rows = []
    for num_bytes in SIZES:
        for path in ("one_shot", "two_shot", "nccl"):
            replies = bench.run(
                f"{path} {num_bytes}", cases.time_all_reduce, path, num_bytes, limit_s=60
            )
            if replies is not None and replies[0]:
                row = slowest(replies)
                factor = 2 * (bench.world_size - 1) / bench.world_size
                row["bus_gb_s"] = round(num_bytes * factor / row["graph_us"] / 1000, 1)
                row["over_us"] = round(row["chain_us"] - row["graph_us"] - row["kernel_us"], 2)
                rows.append(row)
    bench.results["all_reduce"] = rows
    print_table("all-reduce, bf16, us per call in a graph", rows)


def run_fused(bench: Bench) -> None:
    rows = []
    for num_rows in FUSED_ROWS:
        replies = bench.run(f"fused {num_rows}", cases.time_fused, num_rows, HIDDEN, limit_s=60)
        if replies is not None:
            rows.append(slowest(replies))
    bench.results["fused"] = rows
    print_table("all-reduce + residual + RMSNorm, bf16, us in a graph", rows)


def run_gather(bench: Bench) -> None:
    rows = []
    for num_rows in (1, 8, 64, 256):
        replies = bench.run(f"gather {num_rows}", cases.time_all_gather, num_rows, 8, limit_s=60)
        if replies is not None:
            rows.append(slowest(replies))
    bench.results["all_gather"] = rows
    print_table("all-gather of 8 bytes x rows, us in a graph", rows)


def run_recorder(bench: Bench) -> None:
    rows = []
    for path in recorder.PATHS:
        for num_bytes in (8 * _KIB, 64 * _KIB, 256 * _KIB, 1024 * _KIB):
            what = f"recorder of {path} {num_bytes}"
            replies = bench.run(what, recorder.time_recorder, path, num_bytes, limit_s=60)
            if replies is not None:
                row = slowest(replies)
                row["cost_us"] = round(row["on_us"] - row["off_us"], 2)
                row["cost_percent"] = round(100 * row["cost_us"] / row["off_us"], 1)
                rows.append(row)
    bench.results["recorder"] = rows
    print_table("what recording costs, bf16, us per call in a graph", rows)


def run_stress(bench: Bench) -> None:
    replies = bench.run("stress", stress.replay_with_late_ranks, 10_000, limit_s=90)
    if replies is not None:
        bench.results["stress"] = replies
        print("stress:", replies, flush=True)


def run_virtual(bench: Bench) -> None:
    for world_size in (3, 4, 8):
        replies = bench.run(
            f"virtual {world_size}", virtual.check_virtual_ranks, world_size, limit_s=150
        )
        if replies is not None:
            bench.results[f"virtual_{world_size}"] = replies[0] or "exact"
            print(f"virtual ranks, world {world_size}: {replies[0] or 'exact'}", flush=True)


def run_torch(bench: Bench) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        replies = bench.run("torch", torch_peer.time_torch, store, SIZES, limit_s=60)
    if replies is not None:
        rows = [slowest(rows) for rows in zip(*replies, strict=True)]
        bench.results["torch"] = rows
        print_table("torch symmetric memory, bf16, us per call in a graph", rows)


def run_tune(bench: Bench) -> None:
    rows: list[dict[str, Any]] = []
    for num_bytes in (8 * _KIB, 64 * _KIB, 512 * _KIB, 2048 * _KIB):
        for path in ("one_shot", "two_shot"):
            what = f"tiles of {path} {num_bytes}"
            replies = bench.run(what, cases.time_tiles, path, num_bytes, limit_s=60)
            if replies is not None:
                rows += [slowest(ranks) for ranks in zip(*replies, strict=True)]
    bench.results["tune"] = rows
    print_table("tiles", rows)


_RUN = {
    "preflight": run_preflight,
    "check": run_check,
    "time": run_time,
    "fused": run_fused,
    "gather": run_gather,
    "recorder": run_recorder,
    "stress": run_stress,
    "virtual": run_virtual,
    "torch": run_torch,
    "tune": run_tune,
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tpcomm.bench", description=__doc__)
    visible = torch.cuda.device_count()
    parser.add_argument("--world", type=int, default=visible, help="ranks, one GPU each")
    parser.add_argument("--limit-s", type=float, default=300.0, help="total seconds")
    parser.add_argument("--json", type=Path, help="file for the results, besides stdout")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default all")
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.world <= visible:
        parser.error(f"--world {arguments.world}: needs 2 to {visible} GPUs of {visible} visible")
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"sections {unknown}: none of {', '.join(SECTIONS)}")
    if arguments.limit_s <= 0:
        parser.error(f"--limit-s {arguments.limit_s} is not positive")
    return arguments


def main(argv: Sequence[str]) -> int:
    arguments = parse_arguments(argv)
    bench = Bench(arguments.world, arguments.limit_s)
    bench.results |= {
        "bench": "tpcomm",
        "world_size": arguments.world,
        "gpu": torch.cuda.get_device_name(0),
        "torch_version": torch.__version__,
        "python": platform.python_version(),
    }
    try:
        for name in arguments.sections or SECTIONS:
            begun = time.monotonic()
            _RUN[name](bench)
            print(f"[{name}: {time.monotonic() - begun:.1f} s]", flush=True)
    finally:
        bench.close()
        line = json.dumps(bench.results)
        if arguments.json is not None:
            arguments.json.write_text(line + "\n")
        print(line, flush=True)
    return 1 if bench.results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
