"""What this machine can do today, measured next to the benchmark: prints one JSON object.

Run as a process of its own, so that the benchmark needs no torch and the GPU is free afterwards.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

_REPEATS = 20


def main() -> None:
    """Memory read bandwidth (2 GiB bfloat16 matrix-vector) and 8192^3 matmul rate of GPU 0."""
    facts: dict[str, object] = {"cuda": torch.version.cuda, "nccl": None, "nccl_path": None}
    anchor: dict[str, object] = {"mv_tb_s": None, "matmul_tflops": None}
    if torch.cuda.is_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        matrix = torch.randn(32768, 32768, device="cuda").bfloat16()
        vector = torch.randn(32768, device="cuda").bfloat16()
        anchor["mv_tb_s"] = round(matrix.nbytes / _seconds(lambda: matrix @ vector) / 1e12, 3)
        square = matrix[:8192, :8192].contiguous()
        anchor["matmul_tflops"] = round(2 * 8192**3 / _seconds(lambda: square @ square) / 1e12, 1)
    print(json.dumps({"facts": facts, "anchor": anchor}))


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()
