"""A client that sends and returns the messages of generate_pb2 as they are, good and bad.

It does nothing by itself: no retries, no checks. A call that ends in a status raises CallFailed.
One client may be used from several threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from lockstep.client.statuses import call_failed
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc
from tests.helpers.connection import Connection

_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)
_TIMES_PREFIX = "lockstep-"
_INFO_TIMEOUT_S = 30.0


class Generation:
    """One streaming call: iterate it for its deltas. For one thread, save `cancel`.

    `started` is there with the first delta; `finished` (of sample 0) and `finished_samples` (of
    each, by index) are complete after the last, and so is `times`: what the server says of where
    the time went, by key ("lockstep-queue-ms", ...), also after an error.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.started: generate_pb2.Started | None = None
        self.finished: generate_pb2.Finished | None = None
        self.finished_samples: dict[int, generate_pb2.Finished] = {}
        self.times: dict[str, str] = {}

    def __iter__(self) -> Iterator[generate_pb2.Delta]:
        try:
            for event in self._call:
                match event.WhichOneof("event"):
                    case "started":
                        self.started = event.started
                    case "delta":
                        yield event.delta
                    case "finished":
                        self.finished_samples[event.finished.sample_index] = event.finished
            self.finished = self.finished_samples.get(0)
        except grpc.RpcError as error:
            raise call_failed(error) from None
        finally:
            self._note_times()

    def _note_times(self) -> None:
        if self._call.done():
            metadata = self._call.trailing_metadata() or ()
            self.times = {k: v for k, v in metadata if k.startswith(_TIMES_PREFIX)}

    def cancel(self) -> None:
        """Drops the call, which cancels the request. Any thread."""
        self._call.cancel()


class Client:
    """A connection to one server. Closed by `close` or at the end of a `with` block."""

    def __init__(self, server: str | Connection) -> None:
        """`server` is host:port, or says more; nothing is sent yet.

        Proxies of the environment are not used.
        """
        connection = Connection(server) if isinstance(server, str) else server
        self._channel = connection.channel(_OPTIONS)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is in flight and frees the connection."""
        self._channel.close()

    def generate(
        self, request: generate_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Generation:
        """Starts a call; `timeout_s` bounds the whole of it. Errors come while iterating."""
        return Generation(self._stub.Generate(request, timeout=timeout_s))

    def generate_unary(
        self, request: generate_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> generate_pb2.GenerateUnaryResponse:
        """The whole output at once. Raises CallFailed."""
        message = generate_pb2.GenerateUnaryRequest(request=request)
        response: generate_pb2.GenerateUnaryResponse = _called(
            lambda: self._stub.GenerateUnary(message, timeout=timeout_s)
        )
        return response

    def abort(self, request_id: str, tenant: str = "") -> bool:
        """Ends a tenant's request by its name; True if it was in flight. Raises CallFailed."""
        message = generate_pb2.AbortRequest(request_id=request_id, tenant=tenant)
        answer: generate_pb2.AbortResponse = _called(
            lambda: self._stub.Abort(message, timeout=_INFO_TIMEOUT_S)
        )
        return answer.was_active

    def model_info(self) -> generate_pb2.GetModelInfoResponse:
        """What the model can take. Raises CallFailed."""
        message = generate_pb2.GetModelInfoRequest()
        response: generate_pb2.GetModelInfoResponse = _called(
            lambda: self._stub.GetModelInfo(message, timeout=_INFO_TIMEOUT_S)
        )
        return response

    def server_info(self) -> generate_pb2.GetServerInfoResponse:
        """Version, ranks, load. Raises CallFailed."""
        message = generate_pb2.GetServerInfoRequest()
        response: generate_pb2.GetServerInfoResponse = _called(
            lambda: self._stub.GetServerInfo(message, timeout=_INFO_TIMEOUT_S)
        )
        return response


def text_request(text: str, **params: Any) -> generate_pb2.GenerateRequest:
    """A request that continues `text`; `params` are fields of SamplingParams."""
    return generate_pb2.GenerateRequest(
        text=text, sampling_params=generate_pb2.SamplingParams(**params)
    )


def chat_request(
    messages: Sequence[Mapping[str, str]], **params: Any
) -> generate_pb2.GenerateRequest:
    """A request that answers a conversation of {"role", "content"} turns."""
    turns = [generate_pb2.ChatMessage(role=m["role"], content=m["content"]) for m in messages]
    return generate_pb2.GenerateRequest(
        chat=generate_pb2.ChatPrompt(messages=turns),
        sampling_params=generate_pb2.SamplingParams(**params),
    )


def ids_request(token_ids: Sequence[int], **params: Any) -> generate_pb2.GenerateRequest:
    """A request that continues token ids."""
    return generate_pb2.GenerateRequest(
        token_ids=generate_pb2.TokenIds(ids=token_ids),
        sampling_params=generate_pb2.SamplingParams(**params),
    )


def _called(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except grpc.RpcError as error:
        raise call_failed(error) from None
