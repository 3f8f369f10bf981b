"""What the benchmarks' command lines share."""

import sys
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def comma_separated(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """A type of flags like 1,2,3."""
    return lambda text: [kind(item) for item in text.split(",") if item]


def say(line: str) -> None:
    """Tells how it goes, beside the record on the standard output."""
    print(line, file=sys.stderr, flush=True)
