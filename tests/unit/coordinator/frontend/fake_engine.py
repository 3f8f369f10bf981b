"""The engine's end of a frontend's socket, and a frontend that runs against it in this process."""

import asyncio
import contextlib
import dataclasses
import json
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import grpc
import numpy as np

from coordinator.frontend.config import FrontendConfig
from coordinator.frontend.frontend import Ending, run_frontend
from protos.lockstep.v1 import engine_pb2, generate_pb2, generate_pb2_grpc
from tests.unit.coordinator.frontend.small_tokenizers import byte_level, write_checkpoint

VOCAB_SIZE = 512
MAX_MODEL_LEN = 64
MODEL_NAME = "tiny"
WAIT_S = 20.0

T = TypeVar("T")

_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_text_model(folder: Path) -> Path:
    """A checkpoint folder with a byte-level tokenizer and a chat template, without weights."""
    write_checkpoint(folder, byte_level(), templates=(("default", _TEMPLATE),))
    return write_ids_only_model(folder)


def write_ids_only_model(folder: Path) -> Path:
    """A checkpoint folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@dataclass
class FakeEngine:
    """What a test says and hears as the engine."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    port: int = 0
    submits: asyncio.Queue[engine_pb2.Submit] = field(default_factory=asyncio.Queue)
    releases: asyncio.Queue[engine_pb2.Release] = field(default_factory=asyncio.Queue)
    aborts: asyncio.Queue[engine_pb2.AbortByName] = field(default_factory=asyncio.Queue)
    stream_counts: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    rejected: Counter[str] = field(default_factory=Counter)
    listening: asyncio.Event = field(default_factory=asyncio.Event)
    rejections_arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> None:
        """Sorts what the frontend sends, until it closes the socket."""
        while True:
            try:
                (length,) = struct.unpack("<I", await self.reader.readexactly(4))
                frame = await self.reader.readexactly(length)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            message = engine_pb2.FrontendMessage.FromString(frame)
            match message.WhichOneof("message"):
                case "submit":
                    self.submits.put_nowait(message.submit)
                case "release":
                    self.releases.put_nowait(message.release)
                case "abort":
                    self.aborts.put_nowait(message.abort)
                case "rejected":
                    self.rejected[message.rejected.reason] += message.rejected.count
                    self.rejections_arrived.set()
                case "alive":
                    self.stream_counts.put_nowait(message.alive.stream_count)
                case "listening":
                    self.port = message.listening.port
                    self.listening.set()

    def send(self, **message: object) -> None:
        """Sends an EngineMessage with this one field."""
        payload = engine_pb2.EngineMessage(**message).SerializeToString()  # type: ignore[arg-type]
        self.writer.write(struct.pack("<I", len(payload)) + payload)

    def send_state(
        self, is_ready: bool = True, cause: str = "", ranks_up: Sequence[bool] = ()
    ) -> None:
        """Sends a GroupState."""
        ranks = [
            generate_pb2.RankInfo(rank=rank, pid=1000 + rank, is_up=is_up)
            for rank, is_up in enumerate(ranks_up)
        ]
        self.send(
            state=engine_pb2.GroupState(
                is_ready=is_ready,
                cause=cause,
                server=generate_pb2.GetServerInfoResponse(is_ready=is_ready, ranks=ranks, epoch=3),
                max_model_len=MAX_MODEL_LEN if is_ready else 0,
                vocab_size=VOCAB_SIZE if is_ready else 0,
            )
        )

    def send_outputs(
        self,
        outputs: dict[int, Sequence[int]],
        logprobs: Sequence[generate_pb2.TokenLogprobs] = (),
    ) -> None:
        """Sends new ids by handle."""
        self.send(
            outputs=engine_pb2.Outputs(
                handles=np.array(list(outputs), "<i8").tobytes(),
                token_counts=np.array([len(ids) for ids in outputs.values()], "<i4").tobytes(),
                token_ids=np.array([i for ids in outputs.values() for i in ids], "<i4").tobytes(),
                logprobs=logprobs,
            )
        )

    def accept(self, handle: int) -> None:
        """Says that a request is in the queue."""
        self.send_outputs({handle: ()})

    def end(
        self,
        handle: int,
        reason: generate_pb2.FinishReason = generate_pb2.FINISH_REASON_LENGTH,
        stop_token_id: int = 0,
        times: engine_pb2.RequestTimes | None = None,
    ) -> None:
        """Ends a request well."""
        self.send(
            ended=engine_pb2.Ended(
                handle=handle, finish_reason=reason, stop_token_id=stop_token_id, times=times
            )
        )

    def answer_release(
        self, release: engine_pb2.Release, times: engine_pb2.RequestTimes | None = None
    ) -> None:
        """What the engine says to a release."""
        self.send(ended=engine_pb2.Ended(handle=release.handle, times=times))

    def refuse(
        self,
        handle: int,
        code: grpc.StatusCode,
        message: str,
        retry_after_s: float = 0.0,
        times: engine_pb2.RequestTimes | None = None,
    ) -> None:
        """Ends a request with a status."""
        self.send(
            ended=engine_pb2.Ended(
                handle=handle,
                status_code=code.value[0],
                status_message=message,
                retry_after_seconds=retry_after_s,
                times=times,
            )
        )

    async def next_submit(self) -> engine_pb2.Submit:
        """The next request, within the time limit."""
        return await within(self.submits.get())

    async def next_release(self) -> engine_pb2.Release:
        """The next release, within the time limit."""
        return await within(self.releases.get())

    def close(self) -> None:
        """Dies."""
        self.writer.close()


@dataclass
class Served:
    """A frontend that serves, the engine behind it, and a channel to it."""

    engine: FakeEngine
    channel: grpc.aio.Channel
    stub: generate_pb2_grpc.GenerateServiceStub
    ending: "asyncio.Task[Ending]"


async def within(awaitable: Awaitable[T], timeout_s: float = WAIT_S) -> T:
    """The awaitable's result, or TimeoutError."""
    async with asyncio.timeout(timeout_s):
        return await awaitable


def frontend_config(
    model: Path,
    silence_timeout: float = 60.0,
    slow_client_seconds: float = 60.0,
    otlp_endpoint: str = "",
    **changes: object,
) -> FrontendConfig:
    """Settings of a frontend on any port; its engine is this process."""
    config = FrontendConfig(
        engine_fd=-1,
        engine_pid=1,
        model=model,
        served_model_name=MODEL_NAME,
        host="127.0.0.1",
        port=0,
        silence_timeout=silence_timeout,
        num_frontends=1,
        slow_client_seconds=slow_client_seconds,
        tls_cert="",
        tls_key="",
        tls_client_ca="",
        api_keys="",
        max_connections=4096,
        max_concurrent_streams=2048,
        log_format="text",
        otlp_endpoint=otlp_endpoint,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(
    model: Path,
    silence_timeout: float = 60.0,
    is_ready: bool = True,
    slow_client_seconds: float = 60.0,
    otlp_endpoint: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    metadata: Sequence[tuple[str, str]] = (),
    **changes: object,
) -> AsyncIterator[Served]:
    """Runs a frontend for the length of the block; afterwards it has ended.

    `changes` are of its settings; the channel is made with `credentials`, and what finds out
    whether it is ready shows `metadata`.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    engine = FakeEngine(reader, writer)
    listening = asyncio.create_task(engine.listen())
    config = frontend_config(model, silence_timeout, slow_client_seconds, otlp_endpoint, **changes)
    ending = asyncio.create_task(run_frontend(config, theirs))
    try:
        await within(engine.listening.wait())
        if is_ready:
            engine.send_state()
        address = f"127.0.0.1:{engine.port}"
        async with open_channel(address, credentials) as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            if is_ready:
                await _until_ready(stub, metadata)
            yield Served(engine, channel, stub, ending)
    finally:
        engine.close()
        await within(asyncio.wait({ending, listening}))


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None
) -> grpc.aio.Channel:
    """A connection of its own."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


async def _until_ready(
    stub: generate_pb2_grpc.GenerateServiceStub, metadata: Sequence[tuple[str, str]]
) -> None:
    request = generate_pb2.GetServerInfoRequest()
    async with asyncio.timeout(WAIT_S):
        while not (await stub.GetServerInfo(request, metadata=metadata)).is_ready:
            await asyncio.sleep(0)
