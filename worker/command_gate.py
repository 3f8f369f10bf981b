"""The gate that every step command passes: fence, tables, digest of the tables, in this order."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from protos.lockstep.v1 import worker_pb2
from worker.errors import CommandRefused
from worker.tables import AppliedDelta, BatchTables, CommandFence, TableLimits


class CommandGate:
    """One epoch's commands, checked and applied to the host's tables.

    Whatever a command holds, it either passes or raises CommandRefused; after a refusal the epoch
    is over. Used by the device thread alone.
    """

    def __init__(self, epoch: int, limits: TableLimits) -> None:
        self.tables = BatchTables(limits)
        self._fence = CommandFence(epoch)

    def accept(self, command: worker_pb2.StepCommand) -> AppliedDelta:
        """Applies the next command and returns its changes. Raises CommandRefused."""
        self._fence.check(command)
        try:
            delta = worker_pb2.TableDelta.FromString(command.delta)
        except DecodeError as error:
            raise CommandRefused(
                f"command {command.command_id}: its delta is no TableDelta: {error}"
            ) from None
        if command.step_count == 0 and delta.chunks:
            raise CommandRefused(f"command {command.command_id} has chunks but grants no step")
        applied = self.tables.apply(delta)
        if command.table_digest:
            digest = self.tables.digest()
            if command.table_digest != digest:
                raise CommandRefused(
                    f"command {command.command_id}: the coordinator's tables have digest"
                    f" {command.table_digest.hex()}, ours {digest.hex()}"
                )
        return applied
