"""Rectangles land where they belong, by either way, and nothing else is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from worker.checkpoint import TensorEntry, read_header
from worker.errors import CheckpointError
from worker.slice_reader import Rectangle, SliceReader

CPU = torch.device("cpu")
FULL = torch.arange(20 * 12, dtype=torch.float32).view(20, 12)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> TensorEntry:
    path = tmp_path_factory.mktemp("slices") / "model.safetensors"
    save_file({"before": torch.ones(7), "full": FULL}, path)
    return read_header(path)["full"]


@given(
    rows=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    cols=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    staging_bytes=st.sampled_from([4, 48, 100, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gap=st.integers(0, 3),
)
def test_rectangle_is_read_exactly(
    entry: TensorEntry,
    rows: tuple[int, int],
    cols: tuple[int, int],
    staging_bytes: int,
    dtype: torch.dtype,
    gap: int,
) -> None:
    (top, bottom), (left, right) = sorted(rows), sorted(cols)
    area = Rectangle(top, bottom - top, left, right - left)
    padded = torch.full((area.num_rows, area.num_cols + gap), -1.0, dtype=dtype)
    counts: list[int] = []
    with SliceReader(CPU, counts.append, staging_bytes) as reader:
        reader.copy(entry, area, padded[:, : area.num_cols])
        assert reader.bytes_read == sum(counts) == area.num_rows * area.num_cols * 4
    assert torch.equal(padded[:, : area.num_cols], FULL[top:bottom, left:right].to(dtype))
    assert torch.all(padded[:, area.num_cols :] == -1)


def read_all(entry: TensorEntry, destination: Tensor) -> None:
    with SliceReader(CPU, lambda count: None) as reader:
        reader.copy(entry, Rectangle(0, 20, 0, 12), destination)


def test_file_cut_short_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"full": FULL}, path)
    entry = read_header(path)["full"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="tensor full: expected bytes up to .* end of the"):
        read_all(entry, torch.empty(20, 12))


def test_file_removed_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"full": FULL}, path)
    entry = read_header(path)["full"]
    path.unlink()
    with pytest.raises(CheckpointError, match="expected a readable file"):
        read_all(entry, torch.empty(20, 12))
