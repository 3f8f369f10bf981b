"""What a load says of itself, on a terminal and without one."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from worker.load_progress import LoadProgress
from worker.weights import LoadReport

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_names_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = LoadProgress(3)
    progress.update(GIB, 4 * GIB)
    progress.update(4 * GIB, 4 * GIB)
    shown = str(progress._bar)
    assert "rank 3 weights: 100%" in shown and "4.29G/4.29G" in shown
    progress.finish(None)
    assert "rank 3 weights" in terminal.getvalue()


@pytest.mark.parametrize(("total", "num_lines"), [(4 * GIB, 10), (GIB // 2, 0)])
def test_without_a_terminal_a_large_load_has_a_line_every_tenth(
    caplog: pytest.LogCaptureFixture, total: int, num_lines: int
) -> None:
    caplog.set_level(logging.INFO)
    progress = LoadProgress(0)
    for percent in range(101):
        progress.update(total * percent // 100, total)
    assert len(caplog.messages) == num_lines
    if num_lines:
        assert caplog.messages[-1] == "rank 0: 100% of the weights loaded"


def test_the_end_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    LoadProgress(0).finish(LoadReport(num_parameters=2_000_000, bytes_read=8_000_000, seconds=1.5))
    assert caplog.messages == ["loaded 2.0 M parameters, 8.0 MB read, 1.50 s"]
