"""A worker without a model: follows docs/protocol.md in this process, over real gRPC.

It keeps its own tables from the deltas, refuses what the protocol says a worker refuses, and takes
its tokens from `choose_token`, so that a test knows every output beforehand.
"""

import asyncio
import hashlib
import os
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc

from coordinator.failure import boot_id, start_ticks
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc

FLAG_STOP = 1
FLAG_NOT_FINITE = 2


def successor(token_ids: list[int]) -> int:
    """A token that depends on the last one and the position, so that slips show."""
    return (token_ids[-1] * 7 + len(token_ids)) % 1000


def expected_output(
    prompt_ids: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()
) -> list[int]:
    """What a request must get from workers that use `successor`."""
    token_ids = list(prompt_ids)
    for _ in range(max_tokens):
        token_ids.append(successor(token_ids))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt_ids) :]


@dataclass
class FakeSettings:
    """What a test plants; read whenever it matters, so it may change while the worker runs."""

    num_blocks: int = 64
    vocab_size: int = 1000
    version: str = __version__
    digest: str = ""
    device_uuid: str = ""
    choose_token: Callable[[list[int]], int] = successor
    phase_errors: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    is_stalled: bool = False
    stall_at_command: int = 0
    fail_at_command: int = 0
    fail_message: str = "planted failure"
    refuse_at_command: int = 0
    break_stream_at_command: int = 0
    silent_on_quiesce: bool = False
    last_error: str = ""
    not_finite_token: int = -1  # choosing this token counts as non-finite logits
    step_micros: int = 5000
    delay_s: float = 0.0


@dataclass
class _Slot:
    prompt_len: int
    prefill_len: int
    limit: int
    block_ids: list[int]
    stop_ids: tuple[int, ...]
    min_tokens: int
    num_logprobs: int
    token_ids: list[int] = field(default_factory=list)
    position: int = 0
    is_stopped: bool = False


class Refusal(Exception):
    """The command must not run."""


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    """One rank; `serve` starts it on a free port."""

    def __init__(self, settings: FakeSettings) -> None:
        self.settings = settings
        self.commands: list[worker_pb2.StepCommand] = []
        self.calls: list[str] = []
        self.config = worker_pb2.EngineConfig()
        self.is_shut_down = asyncio.Event()
        self.address = ""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._epoch = 0
        self._rank = 0
        self._num_blocks = 0
        self._slots: dict[int, _Slot] = {}
        self._rows: dict[int, int] = {}
        self._released = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, port: int = 0) -> str:
        """Serves on the loopback; returns host:port."""
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        bound = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        self.address = f"127.0.0.1:{bound}"
        return self.address

    async def stop(self) -> None:
        """Ends at once, as a killed process does."""
        self._released.set()
        if self._stopping is not None:
            await self._stopping
        await self._server.stop(grace=None)

    def release_stall(self) -> None:
        """Lets a stalled worker go on."""
        self.settings.is_stalled = False
        self._released.set()

    async def Hello(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Hello", context)
        if request.epoch <= self._epoch:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"epoch {request.epoch} is not above {self._epoch}",
            )
        last_epoch, self._epoch, self._rank = self._epoch, request.epoch, request.rank
        return worker_pb2.HelloResponse(
            version=self.settings.version,
            model_digest=self.settings.digest or request.model_digest,
            last_epoch=last_epoch,
            phase=worker_pb2.WORKER_PHASE_STARTED,
            pid=os.getpid(),
            pid_start_ticks=start_ticks(os.getpid()) + 1,  # never kill the test process
            boot_id=boot_id(),
            host="fake",
            device="cpu",
            device_uuid=self.settings.device_uuid,
        )

    async def Load(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Load", context, request.epoch)
        self.config = request.config
        return worker_pb2.LoadResponse(
            local_q_head_count=3,
            local_kv_head_count=1,
            parameter_count=7,
            vocab_size=self.settings.vocab_size,
            block_bytes=64,
        )

    async def CreateGroupId(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("CreateGroupId", context, request.epoch)
        return worker_pb2.CreateGroupIdResponse(group_id=b"fake")

    async def Join(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Join", context, request.epoch)
        assert request.group_id == b"fake"
        return worker_pb2.JoinResponse(seconds=0.0)

    async def Preflight(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Preflight", context, request.epoch)
        path = worker_pb2.PathReport(path="shm", is_usable=True)
        return worker_pb2.PreflightResponse(paths=[path])

    async def Capture(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("Capture", context, request.epoch)
        return worker_pb2.CaptureResponse(max_block_count=self.settings.num_blocks)

    async def InitKvCache(self, request, context):  # type: ignore[no-untyped-def]
        await self._enter("InitKvCache", context, request.epoch)
        self._num_blocks = request.block_count
        return worker_pb2.InitKvCacheResponse(kv_cache_bytes=64 * request.block_count)

    async def Execute(
        self, request_iterator: AsyncIterator[worker_pb2.ExecuteRequest], context: object
    ) -> AsyncIterator[worker_pb2.ExecuteResponse]:
        self.calls.append("Execute")
        self._slots.clear()
        self._rows.clear()
        fence = _Fence(self._epoch)
        async for request in request_iterator:
            command = request.command
            settings = self.settings
            if settings.is_stalled or command.command_id == settings.stall_at_command:
                await self._released.wait()
            if command.command_id == settings.break_stream_at_command:
                return
            if command.command_id == settings.fail_at_command:
                yield self._failure(command, settings.fail_message, is_refusal=False)
                break
            try:
                if command.command_id == settings.refuse_at_command:
                    raise Refusal("planted refusal")
                fence.check(command)
                delta = worker_pb2.TableDelta.FromString(command.delta)
                self._apply(delta)
                if command.table_digest and command.table_digest != self.digest():
                    raise Refusal(f"tables differ at command {command.command_id}")
            except Refusal as refusal:
                yield self._failure(command, str(refusal), is_refusal=True)
                break
            self.commands.append(command)
            if settings.delay_s:
                await asyncio.sleep(settings.delay_s)
            for report in self._run(command, delta):
                yield report
        async for _ in request_iterator:  # stays until its words are read, as a worker does
            pass

    async def Quiesce(self, request, context):  # type: ignore[no-untyped-def]
        if self.settings.silent_on_quiesce:
            await asyncio.sleep(30)
        await self._enter("Quiesce", context, request.epoch)
        return worker_pb2.QuiesceResponse(last_error=self.settings.last_error, is_drained=True)

    async def Shutdown(self, request, context):  # type: ignore[no-untyped-def]
        self.calls.append("Shutdown")
        self.is_shut_down.set()
        self._released.set()
        self._stopping = asyncio.create_task(self._server.stop(grace=0.05))
        return worker_pb2.ShutdownResponse()

    def digest(self) -> bytes:
        """Of this worker's own tables, as docs/protocol.md lays them out."""
        words = [len(self._rows), *(self._rows[row] for row in range(len(self._rows)))]
        for number in sorted(self._slots):
            slot = self._slots[number]
            words += [number, slot.prompt_len, slot.prefill_len, slot.limit, len(slot.block_ids)]
            words += slot.block_ids
        packed = struct.pack(f"<{len(words)}i", *words)
        return hashlib.blake2b(packed, digest_size=32).digest()[:8]

    async def _enter(self, method: str, context, epoch: int | None = None) -> None:  # type: ignore[no-untyped-def]
        self.calls.append(method)
        if method in self.settings.phase_errors:
            await context.abort(*self.settings.phase_errors[method])
        if epoch is not None and epoch != self._epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"epoch {epoch}")

    def _failure(
        self, command: worker_pb2.StepCommand, message: str, *, is_refusal: bool
    ) -> worker_pb2.ExecuteResponse:
        self.settings.last_error = message
        return worker_pb2.ExecuteResponse(
            failure=worker_pb2.RankFailure(
                command_id=command.command_id,
                step=0 if is_refusal else command.first_step,
                is_refusal=is_refusal,
                message=message,
            )
        )

    def _apply(self, delta: worker_pb2.TableDelta) -> None:
        for (number,) in unpack(delta.closed_slots, 1):
            _require(number in self._slots, f"close of slot {number}, which is not open")
            del self._slots[number]
        for opening in delta.opened_slots:
            self._open(opening)
        for number, index, block_id in unpack(delta.block_appends, 3):
            _require(index == len(self._slots[number].block_ids), "a block out of turn")
            _require(0 < block_id < self._num_blocks, f"block {block_id} is out of range")
            self._slots[number].block_ids.append(block_id)
        for number, limit in unpack(delta.limits, 2):
            slot = self._slots[number]
            _require(limit >= slot.limit, "a limit falls")
            slot.limit = limit
        for row, number in unpack(delta.row_changes, 2):
            self._rows.pop(row, None)
            if number:
                self._rows[row] = number
        _require(sorted(self._rows) == list(range(delta.row_count)), "rows have holes")
        in_rows = list(self._rows.values())
        _require(len(set(in_rows)) == len(in_rows), "a slot has two rows")
        _require(set(in_rows) <= set(self._slots), "a row names a closed slot")
        self._check_blocks()

    def _open(self, opening: worker_pb2.SlotOpen) -> None:
        _require(opening.slot not in self._slots, f"slot {opening.slot} is open")
        _require(1 <= opening.slot <= self.config.max_num_seqs, f"slot {opening.slot} is no slot")
        self._slots[opening.slot] = _Slot(
            opening.prompt_len,
            opening.prefill_len,
            opening.limit,
            [block_id for (block_id,) in unpack(opening.block_ids, 1)],
            tuple(stop_id for (stop_id,) in unpack(opening.stop_ids, 1)),
            opening.min_tokens,
            opening.logprob_count,
        )

    def _check_blocks(self) -> None:
        used = [block_id for slot in self._slots.values() for block_id in slot.block_ids]
        _require(len(set(used)) == len(used), "a block has two owners")
        _require(all(0 < block_id < self._num_blocks for block_id in used), "no such block")
        for slot in self._slots.values():
            covered = len(slot.block_ids) * self.config.block_size
            _require(slot.limit <= covered, "a limit is beyond the blocks")
            _require(slot.limit < self.config.max_model_len, "a limit is beyond the context")

    def _run(
        self, command: worker_pb2.StepCommand, delta: worker_pb2.TableDelta
    ) -> list[worker_pb2.ExecuteResponse]:
        last_step = command.first_step + command.step_count - 1
        reports = []
        for offset in range(command.step_count):
            entries = [self._decode(self._slots[self._rows[row]]) for row in sorted(self._rows)]
            asked = [self._slots[self._rows[row]].num_logprobs >= 0 for row in sorted(self._rows)]
            if offset == 0:
                for slot, is_final in self._prefill(delta):
                    if is_final:
                        entries.append(self._choose(slot))
                        asked.append(slot.num_logprobs >= 0)
            reports.append(self._result(command, command.first_step + offset, entries, any(asked)))
        if self._rank == 0 and command.step_count:
            return reports
        progress = worker_pb2.RankProgress(
            command_id=command.command_id, step=last_step, all_reduce_count=last_step
        )
        return [worker_pb2.ExecuteResponse(progress=progress)]

    def _result(
        self,
        command: worker_pb2.StepCommand,
        step: int,
        entries: list[tuple[int, int]],
        with_logprobs: bool,
    ) -> worker_pb2.ExecuteResponse:
        result = worker_pb2.StepResult(
            command_id=command.command_id,
            step=step,
            token_ids=struct.pack(f"<{len(entries)}i", *(token for token, _ in entries)),
            flags=bytes(flags for _, flags in entries),
            step_micros=self.settings.step_micros,
            all_reduce_count=step,
        )
        if with_logprobs:
            count = len(entries)
            result.logprobs = struct.pack(f"<{count}f", *(-0.5 for _ in entries))
            result.top_token_ids = struct.pack(f"<{count * 20}i", *(list(range(20)) * count))
            result.top_logprobs = struct.pack(f"<{count * 20}f", *([-1.0] * 20 * count))
        return worker_pb2.ExecuteResponse(result=result)

    def _prefill(self, delta: worker_pb2.TableDelta) -> list[tuple[_Slot, bool]]:
        token_ids = [token_id for (token_id,) in unpack(delta.chunk_token_ids, 1)]
        run = []
        for number, start, length in unpack(delta.chunks, 3):
            slot = self._slots[number]
            assert start == len(slot.token_ids), "a chunk out of turn"
            assert start + length <= min(slot.prefill_len, slot.limit), "a chunk beyond its limit"
            slot.token_ids += token_ids[:length]
            del token_ids[:length]
            run.append((slot, len(slot.token_ids) == slot.prefill_len))
        assert not token_ids, "ids without a chunk"
        return run

    def _decode(self, slot: _Slot) -> tuple[int, int]:
        assert slot.position >= slot.prefill_len, "a row that is not prefilled"
        if slot.is_stopped or slot.position >= slot.limit:
            return -1, 0
        slot.position += 1
        return self._emit(slot)

    def _choose(self, slot: _Slot) -> tuple[int, int]:
        slot.position = slot.prefill_len
        return self._emit(slot)

    def _emit(self, slot: _Slot) -> tuple[int, int]:
        token = self.settings.choose_token(slot.token_ids)
        if token == self.settings.not_finite_token:
            slot.is_stopped = True
            return -1, FLAG_NOT_FINITE
        slot.token_ids.append(token)
        num_output = len(slot.token_ids) - slot.prompt_len
        if token in slot.stop_ids and num_output > slot.min_tokens:
            slot.is_stopped = True
            return token, FLAG_STOP
        return token, 0


class _Fence:
    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._command_id = 0
        self._step = 0
        self._digest = bytes(8)

    def check(self, command: worker_pb2.StepCommand) -> None:
        _require(command.epoch == self._epoch, f"epoch {command.epoch}, not {self._epoch}")
        _require(command.command_id == self._command_id + 1, "a gap or repeat")
        _require(command.first_step == self._step + 1, "steps have a gap")
        chained = hashlib.blake2b(self._digest + command.delta, digest_size=32).digest()[:8]
        _require(command.digest == chained, "another digest")
        self._command_id, self._digest = command.command_id, chained
        self._step += command.step_count


def unpack(packed: bytes, width: int) -> list[tuple[int, ...]]:
    """Tuples of `width` little-endian int32."""
    return list(struct.iter_unpack(f"<{width}i", packed))


def _require(is_met: bool, message: str) -> None:
    if not is_met:
        raise Refusal(message)
