"""Clients that arrive whatever happens to the server."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import TracebackType
from typing import Any, Self

import grpc

from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc
from tests.helpers.message_client import ids_request

_CALL_LIMIT_S = 300.0
_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.min_reconnect_backoff_ms", 100)]
_OPTIONS += [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]


class SteadyLoad:
    """Sends a unary request every `period_s` while its block runs; none waits for another.

    `ends` counts how they ended, by the name of their status. All prompts share their beginning.
    """

    def __init__(self, address: str, period_s: float, max_tokens: int) -> None:
        self.ends: Counter[str] = Counter()
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._period_s = period_s
        self._max_tokens = max_tokens
        self._is_over = threading.Event()
        self._calls: list[Any] = []
        self._thread = threading.Thread(target=self._arrive, name="steady load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join(timeout=10)
        for call in self._calls:
            call.cancel()
        self._channel.close()

    def _arrive(self) -> None:
        due = time.monotonic()
        number = 0
        while not self._is_over.wait(max(0.0, due - time.monotonic())):
            due += self._period_s
            number += 1
            prompt = [*range(3, 67), 3 + number % 50]
            request = ids_request(
                prompt, temperature=0.0, max_tokens=self._max_tokens, ignore_eos=True
            )
            message = generate_pb2.GenerateUnaryRequest(request=request)
            call = self._stub.GenerateUnary.future(message, timeout=_CALL_LIMIT_S)
            call.add_done_callback(lambda ended: self.ends.update([ended.code().name]))
            self._calls.append(call)
