"""Reading the ready files of child daemons, and leaving none behind."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReadyRecord:
    """What a daemon wrote when it was serving; addresses are host:port."""

    pid: int
    grpc: str
    metrics: str

    @property
    def port(self) -> int:
        """Of the gRPC server."""
        return int(self.grpc.rpartition(":")[2])

    @property
    def metrics_port(self) -> int:
        """Of the metrics server."""
        return int(self.metrics.rpartition(":")[2])


class PendingReady:
    """A place for one daemon's ready file, until it has been read.

    The place is a private folder that is gone after `close`, so that nothing is left even if this
    process is killed later.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="lockstep-")
        self.path = Path(self._folder.name) / "ready.json"

    def read(self) -> ReadyRecord | None:
        """The record, None until it is there. Files appear whole (they are renamed into place)."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return ReadyRecord(record["pid"], record["grpc"], record["metrics"])

    def close(self) -> None:
        """Removes the folder. Idempotent."""
        self._folder.cleanup()
