"""Shows how loading goes: a bar on a terminal, a line every tenth otherwise."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

from worker.weights import LoadReport

_LOG = logging.getLogger(__name__)


class LoadProgress:
    """Progress of one load. `update` is called by the loading thread."""

    def __init__(self, rank: int) -> None:
        self._bar = (
            tqdm(unit="B", unit_scale=True, desc=f"rank {rank} weights", position=rank, leave=False)
            if sys.stderr.isatty()
            else None
        )
        self._rank = rank
        self._tenths = 0

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Shows `done_bytes` of `total_bytes`."""
        if self._bar is not None:
            self._bar.total = total_bytes
            self._bar.update(done_bytes - self._bar.n)
            return
        tenths = 10 * done_bytes // max(total_bytes, 1)
        if tenths > self._tenths and total_bytes > 1 << 30:
            self._tenths = tenths
            _LOG.info("rank %d: %d%% of the weights loaded", self._rank, 10 * tenths)

    def finish(self, report: LoadReport | None) -> None:
        """Says what it took; None: nothing was read, an earlier epoch's weights are kept."""
        if self._bar is not None:
            self._bar.close()
        if report is None:
            _LOG.info("kept the weights of the epoch before")
            return
        _LOG.info(
            "loaded %.1f M parameters, %.1f MB read, %.2f s",
            report.num_parameters / 1e6,
            report.bytes_read / 1e6,
            report.seconds,
        )
