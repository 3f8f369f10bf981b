"""A worker that records its GPU's kernels: `python -m bench.traced_worker FOLDER SECONDS ...`.

What follows are a worker's own flags. Each SIGUSR1 records for SECONDS and leaves FOLDER/N.json, a
Chrome trace, N counting from 0.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from worker.__main__ import main as run_worker


def main(argv: list[str]) -> int:
    """Runs the worker; returns its exit code."""
    folder, seconds = Path(argv[0]), float(argv[1])
    wanted = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: wanted.set())
    # A daemon: it waits for signals as long as the process lives, and holds nothing.
    threading.Thread(target=_record, args=(folder, seconds, wanted), daemon=True).start()
    return run_worker(argv[2:])


def _record(folder: Path, seconds: float, wanted: threading.Event) -> None:
    for number in itertools.count():
        wanted.wait()
        wanted.clear()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            time.sleep(seconds)
        partial = folder / f"{number}.partial"
        profile.export_chrome_trace(str(partial))
        partial.rename(folder / f"{number}.json")


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(exit_code)  # as worker/__main__.py does, and for its reason
