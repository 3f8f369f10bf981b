"""What a trace of a decoding rank says."""

import json
from pathlib import Path

import pytest

from bench.step_trace import read_trace


def write(path: Path, spans: list[tuple[str, float, float]]) -> Path:
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": duration}
        for name, start, duration in spans
    ]
    other = {"ph": "X", "cat": "cuda_runtime", "name": "launch", "ts": 0.0, "dur": 1e6}
    path.write_text(json.dumps({"traceEvents": [other, *events, {"ph": "M"}]}))
    return path


def test_steps_are_told_apart_and_overlap_counts_once(tmp_path: Path) -> None:
    step = [("embedding_kernel", 0.0, 10.0), ("gemm", 10.0, 50.0), ("other", 20.0, 30.0)]
    spans = [(name, start + 100.0 * n, took) for n in range(5) for name, start, took in step]
    trace = read_trace(write(tmp_path / "t.json", spans))
    assert (trace.num_steps, trace.step_us) == (4, 100.0)
    assert trace.busy_share == pytest.approx(0.6)
    assert trace.kernels["gemm"] == pytest.approx((1.0, 50.0))


def test_a_trace_without_a_whole_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole decode step"):
        read_trace(write(tmp_path / "t.json", [("embedding_kernel", 0.0, 1.0)]))
