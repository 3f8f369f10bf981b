"""Which device each rank gets, decided before any rank starts."""

import itertools
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.errors import ConfigError

_NVIDIA_SMI_TIMEOUT_S = 20.0


def choose_devices(wanted: str | None, num_ranks: int, num_gpus: int) -> tuple[str, ...]:
    """One torch device name a rank.

    `wanted` is --devices: None (GPUs if there are any, else the CPU), "cpu", or GPU numbers "0,1".
    Raises ConfigError naming both numbers when they do not fit.
    """
    if wanted == "cpu" or (wanted is None and num_gpus == 0):
        return ("cpu",) * num_ranks
    if wanted is None:
        if num_ranks > num_gpus:
            raise ConfigError(
                f"--tp is {num_ranks}, but this host has {num_gpus} GPUs; "
                f"use --tp {num_gpus} or less, or --devices cpu"
            )
        return tuple(f"cuda:{index}" for index in range(num_ranks))
    indices = _parse_indices(wanted)
    if len(indices) != num_ranks:
        raise ConfigError(
            f"--devices names {len(indices)} GPUs ({wanted}), but --tp is {num_ranks}"
        )
    missing = [index for index in indices if index >= num_gpus]
    if missing:
        raise ConfigError(
            f"--devices names GPU {missing[0]}, but this host has {num_gpus} GPUs, numbered from 0"
        )
    return tuple(f"cuda:{index}" for index in indices)


def count_gpus(environ: Mapping[str, str], dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that processes of ours will see: all, less what CUDA_VISIBLE_DEVICES hides.

    By `nvidia-smi -L`; in containers without it, by the device nodes.
    """
    num_present = _count_present(dev)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_present
    # CUDA stops reading at the first entry that is no device.
    entries = itertools.takewhile(lambda entry: entry not in ("", "-1"), visible.split(","))
    return min(num_present, sum(1 for _ in entries))


def _count_present(dev: Path) -> int:
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"],
            capture_output=True,
            text=True,
            timeout=_NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        return sum(1 for node in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", node.name))
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"nvidia-smi -L did not answer within {_NVIDIA_SMI_TIMEOUT_S:g} s; "
            "the driver hangs, or choose --devices cpu"
        ) from None
    return sum(1 for line in listing.stdout.splitlines() if re.match(r"GPU \d+:", line))


def _parse_indices(text: str) -> Sequence[int]:
    parts = text.split(",")
    if not all(part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise ConfigError(
            f"--devices is {text!r}; it must be cpu or different GPU numbers like 0,1"
        )
    return [int(part) for part in parts]
