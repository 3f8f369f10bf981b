"""Measured choices of kernels on disk, so that starts on one kind of device choose alike."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from worker.kernels import few_rows_linear, linear_tile, one_row_linear, weight_tiles
from worker.kernels.linear_tile import LinearTile, tiles_for
from worker.kernels.triton_language import triton
from worker.linear_table import LinearCase
from worker.linear_timing import Measured

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a measurement holds for: device, versions, a digest of the kernels."""

    device: str
    torch: str
    triton: str
    kernels: str

    def path(self, folder: Path) -> Path:
        """The file of these measurements."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return folder / f"linears-{digest[:16]}.json"


def origin_of(device: torch.device) -> Origin:
    """Of measurements on this device by this installation."""
    modules = (linear_tile, weight_tiles, one_row_linear, few_rows_linear)
    sources = [Path(str(module.__file__)).read_bytes() for module in modules]
    return Origin(
        device=torch.cuda.get_device_name(device),
        torch=torch.__version__,
        triton=triton.__version__,
        kernels=hashlib.sha256(b"".join(sources)).hexdigest(),
    )


def read_choices(folder: Path, origin: Origin) -> dict[LinearCase, Measured]:
    """What was written for `origin`. Nothing where there is no file or one that is not ours."""
    path = origin.path(folder)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        _LOG.warning("measured choices in %s: not read (%s)", path, error.strerror)
        return {}
    try:
        return _parsed(json.loads(text), origin)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("measured choices in %s: ignored (%s: %s)", path, type(error).__name__, error)
        return {}


def keep_choices(
    folder: Path, origin: Origin, choices: Mapping[LinearCase, Measured]
) -> dict[LinearCase, Measured]:
    """Adds `choices` to the file, atomically; returns those that hold now.

    What another rank has written in the meantime holds, so that the next start finds what this one
    used. A folder that cannot be written is only logged.
    """
    path = origin.path(folder)
    merged = dict(choices) | read_choices(folder, origin)
    cases = [_record(case, measured) for case, measured in merged.items()]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial.write_text(json.dumps({**asdict(origin), "cases": cases}) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        _LOG.warning("measured choices in %s: not kept (%s)", path, error.strerror)
    return merged


def _record(case: LinearCase, measured: Measured) -> dict[str, Any]:
    dtype = str(case.dtype).removeprefix("torch.")
    return {**asdict(case), "dtype": dtype, **asdict(measured)}


def _parsed(content: Any, origin: Origin) -> dict[LinearCase, Measured]:
    if {name: content[name] for name in asdict(origin)} != asdict(origin):
        raise ValueError("of another device, version or kernel")
    return dict(_parsed_case(record) for record in content["cases"])


def _parsed_case(record: dict[str, Any]) -> tuple[LinearCase, Measured]:
    case = LinearCase(
        num_rows=record["num_rows"],
        out_size=record["out_size"],
        in_size=record["in_size"],
        dtype=getattr(torch, record["dtype"]),
        is_gated=record["is_gated"],
    )
    tile = None if record["tile"] is None else LinearTile(**record["tile"])
    if tile is not None and tile not in tiles_for(case.num_rows, case.in_size, case.is_gated):
        raise ValueError(f"{tile} is not a variant for {case}")
    return case, Measured(tile, float(record["vendor_us"]), float(record["tile_us"]))
