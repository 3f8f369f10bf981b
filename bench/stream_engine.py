"""An engine without a model at the other end of a real frontend process: one token a step each."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import psutil

from protos.lockstep.v1 import engine_pb2, generate_pb2

_LENGTH = struct.Struct("<I")
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 15.0
_MAX_MODEL_LEN = 1 << 20


class StreamEngine:
    """Starts `python -m coordinator.frontend` and speaks to it as the engine; a context manager."""

    def __init__(self, model: Path, vocab_size: int) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        self._vocab_size = vocab_size
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "coordinator.frontend", "--port", "0"),
                    *("--engine-fd", str(theirs.fileno()), "--engine-pid", str(os.getpid())),
                    *("--model", str(model), "--served-model-name", "bench"),
                ],
                pass_fds=(theirs.fileno(),),
            )
        self._cpu = psutil.Process(self._process.pid)
        self._submits: asyncio.Queue[engine_pb2.Submit] = asyncio.Queue()
        self._port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        self._listening = asyncio.create_task(self._listen())
        async with asyncio.timeout(_START_LIMIT_S):
            self.address = f"127.0.0.1:{await self._port}"
        self._tell_state()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        try:
            await asyncio.to_thread(self._process.wait, _STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def cpu_seconds(self) -> float:
        """CPU time that the frontend has used."""
        times = self._cpu.cpu_times()
        return float(times.user + times.system)

    async def accept(self, num_requests: int) -> list[int]:
        """Waits for so many requests and accepts each; their handles."""
        handles = []
        for _ in range(num_requests):
            async with asyncio.timeout(_START_LIMIT_S):
                handles.append((await self._submits.get()).handle)
            self._send_outputs(handles[-1:], [])
        return handles

    async def run_steps(
        self, handles: list[int], token_ids: list[int], num_steps: int, step_s: float
    ) -> list[float]:
        """Sends each request a token a step; the times (CLOCK_MONOTONIC) at which steps were sent.

        Request i reads `token_ids` in a circle from position i, so that their texts differ.
        """
        ring = np.array(token_ids, "<i4")
        positions = np.arange(len(handles))
        sent_at = []
        due = time.monotonic()
        for step in range(num_steps):
            due += step_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._send_outputs(handles, ring[(positions + step) % len(ring)].tolist())
            sent_at.append(time.monotonic())
            if step % 250 == 0:
                self._tell_state()
        return sent_at

    def end(self, handles: list[int]) -> None:
        """Ends requests by their length."""
        for handle in handles:
            ended = engine_pb2.Ended(handle=handle, finish_reason=generate_pb2.FINISH_REASON_LENGTH)
            self._send(engine_pb2.EngineMessage(ended=ended))

    def _send_outputs(self, handles: list[int], token_ids: list[int]) -> None:
        count = 1 if token_ids else 0
        outputs = engine_pb2.Outputs(
            handles=np.array(handles, "<i8").tobytes(),
            token_counts=np.full(len(handles), count, "<i4").tobytes(),
            token_ids=np.array(token_ids, "<i4").tobytes(),
        )
        self._send(engine_pb2.EngineMessage(outputs=outputs))

    def _tell_state(self) -> None:
        state = engine_pb2.GroupState(
            is_ready=True, max_model_len=_MAX_MODEL_LEN, vocab_size=self._vocab_size
        )
        self._send(engine_pb2.EngineMessage(state=state))

    def _send(self, message: engine_pb2.EngineMessage) -> None:
        payload = message.SerializeToString()
        self._writer.write(_LENGTH.pack(len(payload)) + payload)

    async def _listen(self) -> None:
        while True:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            message = engine_pb2.FrontendMessage.FromString(await self._reader.readexactly(length))
            if message.HasField("submit"):
                self._submits.put_nowait(message.submit)
            elif message.HasField("listening"):
                self._port.set_result(message.listening.port)
