"""Many requests at once on two ranks: preemption, cancellation, chunked prefill beside decode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import psutil
import pytest

from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc
from tests.helpers.message_client import ids_request
from tests.helpers.served_group import ServedGroup, scrape, value_of
from tests.integration.conftest import CPU_FLAGS

pytestmark = pytest.mark.timeout(240)
_LIMIT_S = 150.0
_IDLE_LIMIT_S = 10.0
_VOCAB_SIZE = 301
_NUM_STREAMS = 64
_CHUNK = 128
_NUM_DECODING = 8
# 256 blocks of 16 tokens and the dummy; a block of rank 0, with 2 of 3 KV heads, is 4 KiB.
_FLAGS = ("--tp", "2", "--max-model-len", "3072", "--kv-cache-bytes", "1028K")
_STEP_FLAGS = ("--max-num-seqs", "64", "--max-batch-tokens", str(_CHUNK + _NUM_DECODING))

T = TypeVar("T")


@pytest.fixture(scope="module")
def group(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    folder = tmp_path_factory.mktemp("batching")
    with ServedGroup(tiny_dir, folder, *CPU_FLAGS, *_FLAGS, *_STEP_FLAGS) as group:
        yield group


class Stream:
    """One call, followed until it ends."""

    def __init__(self, stub: Any, request: generate_pb2.GenerateRequest) -> None:
        self.request = request
        self.ids: list[int] = []
        self.num_finals = 0
        self.reason = generate_pb2.FINISH_REASON_UNSPECIFIED
        self.status = grpc.StatusCode.OK
        self.started = asyncio.Event()
        self.call = stub.Generate(request, timeout=_LIMIT_S)
        self._wanted = 0
        self._has_wanted = asyncio.Event()
        self.ended = asyncio.create_task(self._follow())

    async def received(self, num_tokens: int) -> None:
        """Returns once so many tokens have come."""
        self._wanted = num_tokens
        self._has_wanted.clear()
        if len(self.ids) < num_tokens:
            await asyncio.wait_for(self._has_wanted.wait(), _LIMIT_S)

    async def _follow(self) -> None:
        try:
            async for event in self.call:
                kind = event.WhichOneof("event")
                assert self.num_finals == 0, f"{kind} after the final message"
                assert (kind == "started") != self.started.is_set()
                self.started.set()
                self.ids += event.delta.token_ids
                if len(self.ids) >= self._wanted:
                    self._has_wanted.set()
                if kind == "finished":
                    self.num_finals += 1
                    self.reason = event.finished.finish_reason
                    assert event.finished.usage.output_token_count == len(self.ids)
        except asyncio.CancelledError:
            self.status = grpc.StatusCode.CANCELLED
        except grpc.aio.AioRpcError as error:
            self.status = error.code()


def requests() -> list[generate_pb2.GenerateRequest]:
    """Prompts of 3 to 250 tokens, 40 to 160 tokens of output; every third one samples."""
    random = np.random.default_rng(7)
    made = []
    for index in range(_NUM_STREAMS):
        prompt = random.integers(3, _VOCAB_SIZE, random.integers(3, 251)).tolist()
        sampled = {"temperature": 1.0, "top_p": 0.9} if index % 3 == 2 else {"temperature": 0.0}
        num_tokens = int(random.integers(40, 161))
        request = ids_request(prompt, max_tokens=num_tokens, seed=index, ignore_eos=True, **sampled)
        request.request_id = f"stream-{index}"
        made.append(request)
    return made


@asynccontextmanager
async def connected(group: ServedGroup) -> AsyncIterator[Any]:
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(group.address, options=options) as channel:
        yield generate_pb2_grpc.GenerateServiceStub(channel)


def with_stub(group: ServedGroup, body: Callable[[Any], Awaitable[T]]) -> T:
    """Runs `body(stub)` on a new event loop."""

    async def main() -> T:
        async with connected(group) as stub:
            return await asyncio.wait_for(body(stub), _LIMIT_S)

    return asyncio.run(main())


async def abort(stub: Any, stream: Stream) -> bool:
    request = generate_pb2.AbortRequest(request_id=stream.request.request_id)
    return bool((await stub.Abort(request, timeout=_LIMIT_S)).was_active)


def assert_idle(group: ServedGroup) -> None:
    """Soon nothing runs, nothing waits, no block is taken; and a request is answered."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while any(busy := [value_of(group.metrics, f"lockstep_{name}") for name in names]):
        assert time.monotonic() < deadline, dict(zip(names, busy, strict=True))
        time.sleep(0.02)
    with group.client() as client:
        answer = client.generate_unary(ids_request([5, 6], max_tokens=2), timeout_s=_LIMIT_S)
    assert answer.finished.usage.output_token_count >= 1


def test_64_streams_with_cancellations_end_once_and_equal_the_same_run_alone(
    group: ServedGroup,
) -> None:
    preempted_before = value_of(group.metrics, "lockstep_preemptions_total")

    async def together(stub: Any) -> list[Stream]:
        streams = [Stream(stub, request) for request in requests()]
        # By index: 1 drops its call, 2 is aborted, 3 is aborted in decode, 4 drops in decode.
        fates = {8 * group + fate: fate for group in range(8) for fate in (1, 2, 3, 4)}

        async def meet_fate(stream: Stream, fate: int) -> None:
            await asyncio.wait_for(stream.started.wait(), _LIMIT_S)
            if fate in (3, 4):
                await stream.received(3)
            if fate in (1, 4):
                stream.call.cancel()
            else:
                await abort(stub, stream)

        await asyncio.gather(*(meet_fate(streams[index], fate) for index, fate in fates.items()))
        await asyncio.gather(*(stream.ended for stream in streams))
        for index, stream in enumerate(streams):
            check_end(stream, fates.get(index, 0))
        return streams

    streams = with_stub(group, together)
    assert value_of(group.metrics, "lockstep_preemptions_total") > preempted_before
    assert_idle(group)

    async def alone(stub: Any) -> None:
        for stream in streams:
            # One after the other; cancelled ones as far as they came.
            if stream.ids:
                stream.request.sampling_params.max_tokens = len(stream.ids)
                lonely = Stream(stub, stream.request)
                await lonely.ended
                assert lonely.num_finals == 1
                assert stream.ids == lonely.ids, stream.request.request_id

    with_stub(group, alone)
    assert_idle(group)


def check_end(stream: Stream, fate: int) -> None:
    """One final message; a dropped call has none, as nobody listens."""
    num_wanted = stream.request.sampling_params.max_tokens
    if fate in (1, 4) and stream.status != grpc.StatusCode.OK:
        assert stream.status == grpc.StatusCode.CANCELLED
        assert stream.num_finals == 0
        return
    assert (stream.status, stream.num_finals) == (grpc.StatusCode.OK, 1)
    if stream.reason == generate_pb2.FINISH_REASON_ABORTED:
        assert fate in (2, 3)
    else:
        assert stream.reason == generate_pb2.FINISH_REASON_LENGTH
        assert len(stream.ids) == num_wanted


@contextmanager
def stopped_rank(group: ServedGroup) -> Iterator[None]:
    """No step ends within the block, which must be shorter than the step time-out."""
    process = rank_process(group)
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def rank_process(group: ServedGroup) -> psutil.Process:
    with group.client() as client:
        return psutil.Process(client.server_info().ranks[0].pid)


def num_steps(group: ServedGroup) -> int:
    """Steps that rank 0 has run so far."""
    process = rank_process(group)
    with group.client() as client:
        address = client.server_info().ranks[0].address
    listening = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    (port,) = {c.laddr.port for c in listening} - {int(address.rpartition(":")[2])}
    samples = scrape(f"127.0.0.1:{port}")
    return int(samples["lockstep_step_seconds_count", (("phase", "device"), ("rank", "0"))])


async def wait_running(group: ServedGroup, count: int) -> None:
    """Until so many requests are in the batch."""
    deadline = time.monotonic() + _IDLE_LIMIT_S
    while value_of(group.metrics, "lockstep_num_requests_running") != count:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def long_request(num_tokens: int, max_tokens: int) -> generate_pb2.GenerateRequest:
    prompt = np.random.default_rng(num_tokens).integers(3, _VOCAB_SIZE, num_tokens).tolist()
    request = ids_request(prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    request.request_id = f"long-{num_tokens}"
    request.use_prefix_cache = False  # they are here to take up room, and prefill, each for itself
    return request


@pytest.mark.parametrize("by_abort", [True, False], ids=["abort", "dropped call"])
def test_a_queued_request_is_cancelled_without_output(group: ServedGroup, by_abort: bool) -> None:
    async def body(stub: Any) -> None:
        with stopped_rank(group):  # so that the first stays in its prefill, however slow we are
            running = Stream(stub, long_request(1900, 60))
            await asyncio.wait_for(running.started.wait(), _LIMIT_S)
            await wait_running(group, 1)
            queued = Stream(stub, long_request(1800, 60))
            await asyncio.wait_for(queued.started.wait(), _LIMIT_S)
            assert value_of(group.metrics, "lockstep_num_requests_waiting") == 1
            if by_abort:
                assert await abort(stub, queued)
            else:
                queued.call.cancel()
            await queued.ended
        assert queued.ids == []
        assert queued.num_finals == int(by_abort)
        await running.ended
        assert (running.num_finals, len(running.ids)) == (1, 60)

    with_stub(group, body)
    assert_idle(group)


@pytest.mark.parametrize("by_abort", [True, False], ids=["abort", "dropped call"])
def test_a_request_in_prefill_is_cancelled_and_frees_its_blocks(
    group: ServedGroup, by_abort: bool
) -> None:
    generated_before = value_of(group.metrics, "lockstep_generation_tokens_total")

    async def body(stub: Any) -> None:
        stream = Stream(stub, long_request(3000, 60))
        await asyncio.wait_for(stream.started.wait(), _LIMIT_S)
        # As no step ends now, its prefill cannot either, however late the cancellation comes.
        await wait_running(group, 1)
        if by_abort:
            assert await abort(stub, stream)
        else:
            stream.call.cancel()
        await stream.ended
        assert stream.ids == []
        assert stream.num_finals == int(by_abort)

    with stopped_rank(group):
        with_stub(group, body)
    assert value_of(group.metrics, "lockstep_generation_tokens_total") == generated_before
    assert_idle(group)


def test_decoding_streams_get_a_token_in_each_step_of_a_long_prefill(group: ServedGroup) -> None:
    """Counted in steps of the rank: when a client reads its messages says little about them."""
    steps_before = num_steps(group)

    async def body(stub: Any) -> None:
        with stopped_rank(group):  # so that all of them have come before a step ends
            streams = [
                Stream(stub, ids_request([7, 8, 9 + index], max_tokens=200, ignore_eos=True))
                for index in range(_NUM_DECODING)
            ]
            for stream in streams:
                await asyncio.wait_for(stream.started.wait(), _LIMIT_S)
            streams.append(Stream(stub, long_request(2000, 2)))
            await asyncio.wait_for(streams[-1].started.wait(), _LIMIT_S)
        for stream in streams:
            await stream.ended
            assert stream.num_finals == 1

    with_stub(group, body)
    # Commands that were out before all had come, and no more: were the streams to wait for the
    # long prompt, its sixteen steps would come on top of their two hundred.
    num_chunks = -(-2000 // _CHUNK)
    assert 200 <= num_steps(group) - steps_before <= 200 + num_chunks // 2


def test_a_request_that_never_fits_is_refused_at_admission(group: ServedGroup) -> None:
    async def body(stub: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Generate(long_request(3072, 1), timeout=_LIMIT_S):
                pass
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "3072" in str(caught.value.details()) and "3071" in str(caught.value.details())

    with_stub(group, body)
    assert not any(value for (name, _), value in scrape(group.metrics).items() if "failed" in name)
