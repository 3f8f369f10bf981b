"""Safetensors checkpoints: which tensor lies where, without reading any of them.

Layout of a file (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header
size, a JSON header of {name: {dtype, shape, data_offsets}}, then the bytes, row-major. A folder
holds either model.safetensors or several files with model.safetensors.index.json.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from worker.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `dtype` keeps the header's spelling: what is unreadable may exist."""

    name: str
    path: Path
    dtype_name: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Raises CheckpointError for a dtype that no weight may have."""
        dtype = _DTYPES.get(self.dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {self.name}: expected dtype {', '.join(_DTYPES)},"
                f" found {self.dtype_name}"
            )
        return dtype


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder, by name."""

    model_dir: Path
    entries: Mapping[str, TensorEntry]

    def entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """The tensor `name`. Raises CheckpointError where it is missing or shaped otherwise."""
        found = self.entries.get(name)
        if found is None:
            raise CheckpointError(
                f"{self.model_dir}: tensor {name}: expected shape {list(shape)}, found no such"
                f" tensor among {len(self.entries)}"
            )
        if found.shape != shape:
            raise CheckpointError(
                f"{found.path}: tensor {name}: expected shape {list(shape)}, found"
                f" {list(found.shape)}"
            )
        return found


def open_checkpoint(model_dir: Path) -> Checkpoint:
    """Read the headers of every file. Raises CheckpointError naming file, expected and found."""
    index_path = model_dir / INDEX_FILE
    if not index_path.exists():
        return Checkpoint(model_dir, read_header(_single_file(model_dir)))
    weight_map = _read_index(index_path)
    headers = {name: read_header(model_dir / name) for name in sorted(set(weight_map.values()))}
    entries: dict[str, TensorEntry] = {}
    for tensor, file_name in weight_map.items():
        found = headers[file_name].get(tensor)
        if found is None:
            raise CheckpointError(
                f"{model_dir / file_name}: tensor {tensor}: expected by {INDEX_FILE}, found none"
            )
        entries[tensor] = found
    return Checkpoint(model_dir, entries)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Every byte range is checked against the file's size."""
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 0 < header_size <= min(_MAX_HEADER_BYTES, file_size - 8):
                raise CheckpointError(
                    f"{path}: expected a safetensors header of at most {file_size - 8} bytes,"
                    f" found size {header_size}"
                )
            raw = file.read(header_size)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error}") from error
    header = _parse_json_object(path, raw)
    return {
        name: _entry(path, name, fields, 8 + header_size, file_size)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _entry(path: Path, name: str, fields: Any, start: int, file_size: int) -> TensorEntry:
    try:
        dtype_name = str(fields["dtype"])
        shape = tuple(int(size) for size in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: tensor {name}: expected dtype, shape and data_offsets, found {fields!r}"
        ) from error
    if not 0 <= begin <= end or start + end > file_size:
        raise CheckpointError(
            f"{path}: tensor {name}: expected bytes {start + begin} to {start + end}, found a file"
            f" of {file_size} bytes (cut short?)"
        )
    dtype = _DTYPES.get(dtype_name)
    if dtype is not None and math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name}: expected {math.prod(shape) * dtype.itemsize} bytes for"
            f" {dtype_name} {list(shape)}, found {end - begin}"
        )
    return TensorEntry(name, path, dtype_name, shape, start + begin, end - begin)


def _single_file(model_dir: Path) -> Path:
    path = model_dir / SINGLE_FILE
    if path.exists():
        return path
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: expected a folder, found none")
    others = sorted(p.name for p in model_dir.glob("*") if p.suffix in {".safetensors", ".bin"})
    found = ", ".join(others) or "neither"
    raise CheckpointError(f"{model_dir}: expected {SINGLE_FILE} or {INDEX_FILE}, found {found}")


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _parse_json_object(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected an object weight_map, found {type(weight_map)}")
    for tensor, name in weight_map.items():
        # The index may come from a stranger: it must not point outside its folder.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: tensor {tensor}: expected a file name, found {name!r}")
    return weight_map


def _parse_json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(parsed).__name__}")
    return parsed
