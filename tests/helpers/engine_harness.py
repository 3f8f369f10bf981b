"""The engine without its processes: a group leader, fake ranks, a frontend that only listens."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.config import CoordinatorConfig
from coordinator.constraints import Constraints
from coordinator.errors import StartRefused
from coordinator.group_leader import GroupLeader
from coordinator.group_status import GroupStatus
from coordinator.metrics import EngineMetrics
from coordinator.model_config import ModelConfig
from coordinator.outbox import Outbox
from coordinator.request_book import RequestBook
from coordinator.step_log import StepLog
from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.helpers.fake_worker import FakeSettings, FakeWorker

LIMIT_S = 10.0
MODEL = ModelConfig("float32", 512)


class NoMasks:
    """A MaskSource that never answers."""

    def open(
        self,
        key: int,
        params: generate_pb2.SamplingParams,
        output_ids: Sequence[int],
        vocab_size: int,
    ) -> None: ...

    def advance(self, key: int, token_id: int) -> None: ...

    def close(self, key: int) -> None: ...


def make_submit(
    handle: int,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    request_id: str = "",
    stop_ids: Sequence[int] = (),
    resume: Sequence[int] = (),
    logprobs: int | None = None,
    group: int = 0,
    tenant: str = "",
    priority: int = 0,
    deadline: float = 0.0,
    use_prefix_cache: bool = False,
    **sampling: Any,
) -> engine_pb2.Submit:
    """A Submit as frontends send it: every parameter set."""
    defaults: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 7,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "ignore_eos": False,
    }
    params = generate_pb2.SamplingParams(max_tokens=max_tokens, **(defaults | sampling))
    if logprobs is not None:
        params.logprobs = logprobs
    return engine_pb2.Submit(
        handle=handle,
        request_id=request_id or f"request-{handle}",
        prompt_ids=pack(prompt_ids),
        resume_output_ids=pack(resume),
        sampling_params=params,
        stop_ids=pack(stop_ids),
        use_prefix_cache=use_prefix_cache,
        arrival_time=asyncio.get_running_loop().time(),
        group=group,
        tenant=tenant,
        priority=priority,
        deadline=deadline,
    )


def pack(numbers: Sequence[int]) -> bytes:
    """Little-endian int32."""
    return struct.pack(f"<{len(numbers)}i", *numbers)


@dataclass
class Heard:
    """What a frontend was told."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, list[engine_pb2.Ended]] = field(default_factory=dict)
    logprobs: list[generate_pb2.TokenLogprobs] = field(default_factory=list)
    prompts: dict[int, list[engine_pb2.PromptPiece]] = field(default_factory=dict)
    outcomes: list[engine_pb2.AbortOutcome] = field(default_factory=list)
    states: list[engine_pb2.GroupState] = field(default_factory=list)
    drains: list[engine_pb2.Drain] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, message: engine_pb2.EngineMessage) -> None:
        """Takes one message."""
        kind = message.WhichOneof("message")
        if kind == "outputs":
            self._hear_outputs(message.outputs)
        elif kind == "ended":
            self.ended.setdefault(message.ended.handle, []).append(message.ended)
        elif kind == "abort_outcome":
            self.outcomes.append(message.abort_outcome)
        elif kind == "state":
            self.states.append(message.state)
        elif kind == "drain":
            self.drains.append(message.drain)
        self.changed.set()

    async def until(self, is_met: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Waits until a condition on what was heard is met."""
        async with asyncio.timeout(limit_s):
            while not is_met():
                self.changed.clear()
                await self.changed.wait()

    async def end_of(self, *handles: int) -> None:
        """Waits until these requests have ended."""
        await self.until(lambda: all(handle in self.ended for handle in handles))

    def _hear_outputs(self, outputs: engine_pb2.Outputs) -> None:
        for piece in outputs.prompt_pieces:
            self.prompts.setdefault(piece.handle, []).append(piece)
        count = len(outputs.handles) // 8
        handles = struct.unpack(f"<{count}q", outputs.handles)
        counts = struct.unpack(f"<{count}i", outputs.token_counts)
        token_ids = list(struct.unpack(f"<{len(outputs.token_ids) // 4}i", outputs.token_ids))
        for handle, num_tokens in zip(handles, counts, strict=True):
            assert handle not in self.ended, f"tokens of {handle} after its end"
            self.tokens.setdefault(handle, []).extend(token_ids[:num_tokens])
            del token_ids[:num_tokens]
        assert not token_ids
        self.logprobs += outputs.logprobs


def make_config(addresses: Sequence[str], **changes: Any) -> CoordinatorConfig:
    """Small and quick."""
    values: dict[str, Any] = {
        "model": Path("/nowhere"),
        "served_model_name": "fake",
        "workers": tuple(addresses),
        "max_num_seqs": 8,
        "max_batch_tokens": 32,
        "block_size": 4,
        "step_timeout": 5.0,
        "startup_timeout": 10.0,
    }
    return CoordinatorConfig(**(values | changes))


@dataclass
class Harness:
    """A running group and what its one frontend heard."""

    workers: list[FakeWorker]
    settings: list[FakeSettings]
    book: RequestBook
    leader: GroupLeader
    status: GroupStatus
    metrics: EngineMetrics
    heard: Heard
    task: asyncio.Task[None]

    def submit(self, handle: int, prompt_ids: Sequence[int], max_tokens: int, **more: Any) -> None:
        """Frontend 0 submits a request."""
        self.book.submit(0, make_submit(handle, prompt_ids, max_tokens, **more))
        self.leader.wake()

    async def settled(self, limit_s: float = LIMIT_S) -> None:
        """Waits until nothing runs or waits and every block is free again."""
        batch = self.book.batch
        assert batch is not None
        async with asyncio.timeout(limit_s):
            while batch.num_running or len(batch.queue) or batch.num_unreported:
                await asyncio.sleep(0)
        batch.check()
        assert batch.allocator.num_free_blocks == batch.allocator.num_usable_blocks

    async def restart_workers(self) -> None:
        """Does what a supervisor does: starts workers on their old ports once they have ended.

        Before, the Shutdown that is meant for the old one could end the new one.
        """
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(worker.is_shut_down.wait() for worker in self.workers))
        for rank, worker in enumerate(self.workers):
            await worker.stop()
            self.workers[rank] = FakeWorker(self.settings[rank])
            await self.workers[rank].serve(int(worker.address.rpartition(":")[2]))


@asynccontextmanager
async def running_group(
    settings: Sequence[FakeSettings] = (),
    is_awaited: bool = True,
    metrics: EngineMetrics | None = None,
    step_log: StepLog | None = None,
    constraints: Constraints | None = None,
    **config: Any,
) -> AsyncIterator[Harness]:
    """Starts fake ranks and a leader; waits until the group is up unless told not to.

    `step_log` stays the caller's to close.
    """
    settings = list(settings) or [FakeSettings(), FakeSettings()]
    workers = [FakeWorker(one) for one in settings]
    addresses = [await worker.serve() for worker in workers]
    made = make_config(addresses, **config)
    outbox, heard = Outbox(), Heard()
    metrics = metrics or EngineMetrics("fake")
    constraints = constraints or Constraints(NoMasks())
    book = RequestBook(outbox, metrics, made.queue_limits, constraints)

    def flush() -> None:
        for messages in outbox.take().values():
            for message in messages:
                heard.hear(message)

    def tell_state() -> None:
        heard.hear(status.message())

    status = GroupStatus(made, metrics, tell_state)
    leader = GroupLeader(made, MODEL, "digest", book, status, metrics, flush, step_log)
    task = asyncio.create_task(leader.run())
    harness = Harness(workers, settings, book, leader, status, metrics, heard, task)
    try:
        if is_awaited:
            await wait_for_group(harness)
        yield harness
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, StartRefused):
            await task
        await leader.close(tell_workers=False)
        for worker in workers:
            await worker.stop()


async def wait_for_group(harness: Harness) -> None:
    """Waits until the group is up; raises what its leader raised."""
    up = asyncio.create_task(harness.leader.is_up.wait())
    await asyncio.wait({up, harness.task}, timeout=LIMIT_S, return_when="FIRST_COMPLETED")
    up.cancel()
    if harness.task.done():
        harness.task.result()
    assert harness.leader.is_up.is_set(), "the group is not up in time"
