"""Fails when a test was skipped for anything but missing GPUs: `check_skips.py JUNIT.xml`.

A test that skips itself where it could run proves nothing, and nobody sees it.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ALLOWED = re.compile(r"needs [1-9]\d* GPUs?")


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    report = ElementTree.parse(Path(arguments[0]))
    wrong = list(wrong_skips(report.getroot()))
    for line in wrong:
        print(f"skipped, though it needs no GPU: {line}", file=sys.stderr)
    num_run = sum(1 for case in report.iter("testcase") if case.find("skipped") is None)
    if num_run == 0:
        print("no test was run", file=sys.stderr)
    return 1 if wrong or num_run == 0 else 0


def wrong_skips(report: ElementTree.Element) -> Iterator[str]:
    """Test and reason of every skip, expected failures among them, that is not for lack of GPUs."""
    for case in report.iter("testcase"):
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if skip.get("type") != "pytest.skip" or not ALLOWED.fullmatch(reason):
                yield f"{case.get('classname')}::{case.get('name')}: {reason or 'no reason'}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
