"""What the benchmarks' command lines share."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from bench.record import RESULTS

_T = TypeVar("_T")
_MODELS = Path(__file__).parent / "models"


def comma_separated(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """A type of flags like 1,2,3."""
    return lambda text: [kind(item) for item in text.split(",") if item]


def say(line: str) -> None:
    """Tells how it goes, beside the record on the standard output."""
    print(line, file=sys.stderr, flush=True)


def model_dir(name: str) -> Path:
    """The folder of a model: a name in bench/models, or a folder."""
    known = _MODELS / name
    return known if known.is_dir() else Path(name)


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """Where the record is kept: `record_folder` reads them."""
    parser.add_argument("--dry-run", action="store_true", help="keep no file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")


def record_folder(options: argparse.Namespace) -> Path | None:
    """For `report`; None with --dry-run."""
    return None if options.dry_run else options.results
