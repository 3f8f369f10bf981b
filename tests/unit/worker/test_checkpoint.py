"""A checkpoint that is not whole is refused in one line: file, tensor, expected, found."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint, read_header
from worker.errors import CheckpointError


def write_file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def write_raw(path: Path, header: object, payload: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + payload)
    return path


def test_header_gives_dtype_shape_and_place(tmp_path: Path) -> None:
    weights = torch.arange(12, dtype=torch.float32).view(3, 4)
    path = write_file(tmp_path / SINGLE_FILE, a=weights, b=torch.ones(5, dtype=torch.bfloat16))
    entries = read_header(path)
    assert {name: (e.dtype, e.shape) for name, e in entries.items()} == {
        "a": (torch.float32, (3, 4)),
        "b": (torch.bfloat16, (5,)),
    }
    place = slice(entries["a"].offset, entries["a"].offset + entries["a"].num_bytes)
    assert path.read_bytes()[place] == weights.numpy().tobytes()


def test_sharded_checkpoint_is_found_through_its_index(tmp_path: Path) -> None:
    write_file(tmp_path / "one.safetensors", a=torch.ones(2))
    write_file(tmp_path / "two.safetensors", b=torch.ones(3))
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entry("b", (3,)).path == tmp_path / "two.safetensors"


def missing_shard(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))


def tensor_not_in_its_shard(folder: Path) -> None:
    write_file(folder / "one.safetensors", b=torch.ones(2))
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))


def index_pointing_outside(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))


def index_without_map(folder: Path) -> None:
    (folder / INDEX_FILE).write_text("{}")


def only_pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def truncated(folder: Path) -> None:
    path = write_file(folder / SINGLE_FILE, a=torch.ones(64))
    path.write_bytes(path.read_bytes()[:-1])


def header_cut_short(folder: Path) -> None:
    path = write_file(folder / SINGLE_FILE, a=torch.ones(64))
    path.write_bytes(path.read_bytes()[:20])


def empty_file(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(b"")


def header_not_json(folder: Path) -> None:
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", 4) + b"{{{{")


def wrong_byte_count(folder: Path) -> None:
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    write_raw(folder / SINGLE_FILE, {"a": fields}, b"1234")


def fields_missing(folder: Path) -> None:
    write_raw(folder / SINGLE_FILE, {"a": {"dtype": "F32"}})


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (missing_shard, r"gone\.safetensors: expected a readable file"),
        (tensor_not_in_its_shard, r"one\.safetensors: tensor a: expected by .*, found none"),
        (index_pointing_outside, r"tensor a: expected a file name, found '\.\./one"),
        (index_without_map, r"expected an object weight_map"),
        (only_pickles, r"expected model\.safetensors or .*, found pytorch_model\.bin"),
        (lambda folder: None, r"found neither"),
        (truncated, r"tensor a: expected bytes \d+ to \d+, found a file of \d+ bytes"),
        (header_cut_short, r"expected a safetensors header of at most 12 bytes, found size \d+"),
        (empty_file, r"expected a safetensors header"),
        (header_not_json, r"expected JSON"),
        (wrong_byte_count, r"tensor a: expected 8 bytes for F32 \[2\], found 4"),
        (fields_missing, r"tensor a: expected dtype, shape and data_offsets, found"),
    ],
)
def test_broken_checkpoint_is_refused_in_one_line(
    tmp_path: Path, plant: Callable[[Path], None], message: str
) -> None:
    plant(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: expected a folder"):
        open_checkpoint(tmp_path / "gone")


def test_missing_tensor_and_wrong_shape_and_dtype_are_named(tmp_path: Path) -> None:
    write_file(tmp_path / SINGLE_FILE, a=torch.ones(2, 3), b=torch.ones(2, dtype=torch.int8))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor c: expected shape \[4\], found no such"):
        checkpoint.entry("c", (4,))
    with pytest.raises(CheckpointError, match=r"tensor a: expected shape \[3, 2\], found \[2, 3\]"):
        checkpoint.entry("a", (3, 2))
    with pytest.raises(CheckpointError, match=r"tensor b: expected dtype F32, .*, found I8"):
        _ = checkpoint.entry("b", (2,)).dtype
