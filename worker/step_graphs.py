"""All captured graphs of a rank."""

from __future__ import annotations

import logging

from protos.lockstep.v1 import worker_pb2
from worker.cuda_graphs import DecodeGraphs, GraphPool
from worker.mixed_graphs import MixedGraphs
from worker.model_runner import ModelRunner

_LOG = logging.getLogger(__name__)


class StepGraphs:
    """Decode graphs and mixed graphs over one pool. Used by the device thread alone."""

    def __init__(self, runner: ModelRunner, config: worker_pb2.EngineConfig) -> None:
        self._pool = GraphPool(runner.comm)
        self.decode = DecodeGraphs(runner, self._pool, config.max_num_seqs)
        self.mixed = MixedGraphs(runner, self._pool, config.max_num_seqs, config.max_batch_tokens)

    def capture(self) -> None:
        """Captures all. Collective. The mixed graphs go first: they need the most memory."""
        self.mixed.capture()
        self.decode.capture()
        _LOG.info(
            "captured graphs for %d decode sizes and %d mixed sizes",
            len(self.decode.sizes),
            len(self.mixed.row_sizes) * len(self.mixed.token_sizes),
        )

    @property
    def num_replayed_all_reduces(self) -> int:
        """All-reduces in replays so far, which the communicator does not count."""
        return self._pool.num_replayed_all_reduces
