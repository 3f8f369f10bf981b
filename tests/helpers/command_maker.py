"""Numbers and digests step commands as a coordinator does."""

from __future__ import annotations

import hashlib
import struct

from protos.lockstep.v1.worker_pb2 import StepCommand, TableDelta


class CommandMaker:
    """The commands of one epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.command_id = 0
        self.next_step = 1
        self.digest = bytes(8)

    def next(self, delta: TableDelta | bytes, steps: int = 1) -> StepCommand:
        """The next command, with a right digest over whatever `delta` is."""
        serialised = delta if isinstance(delta, bytes) else delta.SerializeToString()
        self.digest = hashlib.blake2b(self.digest + serialised, digest_size=32).digest()[:8]
        self.command_id += 1
        first_step = self.next_step
        self.next_step += max(0, steps)
        return StepCommand(
            command_id=self.command_id,
            epoch=self.epoch,
            first_step=first_step,
            step_count=steps,
            delta=serialised,
            digest=self.digest,
        )


def packed(*numbers: int) -> bytes:
    """Little-endian int32."""
    return struct.pack(f"<{len(numbers)}i", *numbers)
