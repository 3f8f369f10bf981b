"""A public server that answers by script: what clients meet, planted faults included.

It always tells the same story, token by token, and goes on after `resume_output_ids` like a real
server. A test plants what its next calls do; calls beyond that are served whole.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

WAIT_S = 20.0
STORY = (("Hi ", 4), ("the", 5), ("re", 6))
TEXT = "Hi there"
IDS = (4, 5, 6)
NUM_PROMPT_TOKENS = 3
MAX_MODEL_LEN = 64
DRAWN_SEED = 7
TIMES = (("lockstep-queue-ms", "1.500"), ("other", "x"))

Script = Callable[["ScriptedServer", generate_pb2.GenerateRequest, Any], Iterator[Any]]


class ScriptedServer(generate_pb2_grpc.GenerateServiceServicer):
    """Calls of all methods take the next script in order of arrival. Any thread."""

    def __init__(self) -> None:
        self.requests: list[generate_pb2.GenerateRequest] = []
        self.arrivals: list[float] = []
        self.metadata: list[dict[str, str]] = []
        self.limits_s: list[float] = []
        self.told = threading.Event()
        """A script that hangs has said what it says."""
        self.cancelled = threading.Event()
        self.story: Sequence[tuple[str, int]] = STORY
        self._arrival = threading.Condition()
        self._scripts: deque[Script] = deque()

    def plant(self, *scripts: Script) -> None:
        """The next calls of Generate and GenerateUnary do this."""
        self._scripts.extend(scripts)

    def Generate(self, request: generate_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        self._note(request, context)
        yield from self._next_script()(self, request, context)

    def GenerateUnary(self, request: generate_pb2.GenerateUnaryRequest, context: Any) -> Any:
        self._note(request.request, context)
        answer = generate_pb2.GenerateUnaryResponse()
        for event in self._next_script()(self, request.request, context):
            match event.WhichOneof("event"):
                case "started":
                    answer.started.CopyFrom(event.started)
                case "prompt_logprobs":
                    piece, joined = event.prompt_logprobs, answer.prompt_logprobs
                    joined.first_position = joined.first_position or piece.first_position
                    joined.token_ids.extend(piece.token_ids)
                    joined.logprobs.extend(piece.logprobs)
                case "delta":
                    answer.output.text += event.delta.text
                    answer.output.token_ids.extend(event.delta.token_ids)
                case "finished":
                    answer.finished.CopyFrom(event.finished)
        return answer

    def Abort(self, request: generate_pb2.AbortRequest, context: Any) -> Any:
        return generate_pb2.AbortResponse(was_active=request.request_id == "r")

    def GetModelInfo(self, request: Any, context: Any) -> Any:
        return generate_pb2.GetModelInfoResponse(model="story", max_model_len=MAX_MODEL_LEN)

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        return generate_pb2.GetServerInfoResponse(
            version="9", epoch=2, ranks=[generate_pb2.RankInfo(rank=0, pid=11)]
        )

    def arrived(self, count: int) -> bool:
        """Waits until so many calls have come."""
        with self._arrival:
            return self._arrival.wait_for(lambda: len(self.requests) >= count, WAIT_S)

    def _note(self, request: generate_pb2.GenerateRequest, context: Any) -> None:
        with self._arrival:
            self.arrivals.append(time.monotonic())
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            self.limits_s.append(context.time_remaining())
            self._arrival.notify_all()
        context.set_trailing_metadata(TIMES)

    def _next_script(self) -> Script:
        return self._scripts.popleft() if self._scripts else whole


def whole(server: ScriptedServer, request: generate_pb2.GenerateRequest, context: Any) -> Any:
    """Served to the end."""
    yield from tokens(server, request)
    yield finished(len(server.story))


def whole_and_broken(server: ScriptedServer, request: Any, context: Any) -> Any:
    """Served to the end, whose status is lost."""
    yield from whole(server, request, context)
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


def fails(code: grpc.StatusCode, message: str = "planted", *metadata: tuple[str, str]) -> Script:
    """Refused before anything is sent."""

    def script(server: ScriptedServer, request: Any, context: Any) -> Any:
        yield from ()
        context.set_trailing_metadata((*TIMES, *metadata))
        context.abort(code, message)

    return script


def breaks_after(num_tokens: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Script:
    """Sends `started` and so many tokens, then ends with the code."""

    def script(server: ScriptedServer, request: Any, context: Any) -> Any:
        yield from list(tokens(server, request))[: 1 + num_tokens]
        context.abort(code, "rank 1 lost at step 5: Connection reset")

    return script


def hangs_after(num_tokens: int) -> Script:
    """Sends `started` and so many tokens, then nothing; sets `cancelled` when the client leaves."""

    def script(server: ScriptedServer, request: Any, context: Any) -> Any:
        context.add_callback(server.cancelled.set)
        yield from list(tokens(server, request))[: 1 + num_tokens]
        server.told.set()
        server.cancelled.wait(WAIT_S)

    return script


def ends_early(server: ScriptedServer, request: Any, context: Any) -> Any:
    """Ends well without its last message."""
    yield from tokens(server, request)


def tokens(server: ScriptedServer, request: generate_pb2.GenerateRequest) -> Iterator[Any]:
    """`started` and the story behind what the request resumes."""
    params = request.sampling_params
    started = generate_pb2.Started(
        request_id=request.request_id or f"call-{len(server.requests)}",
        seed=params.seed if params.HasField("seed") else DRAWN_SEED,
        prompt_token_count=NUM_PROMPT_TOKENS,
    )
    yield generate_pb2.GenerateResponse(started=started)
    for text, token_id in server.story[len(request.resume_output_ids) :]:
        delta = generate_pb2.Delta(text=text, token_ids=[token_id])
        yield generate_pb2.GenerateResponse(delta=delta)


def finished(num_tokens: int, sample_index: int = 0) -> generate_pb2.GenerateResponse:
    """The last event of a sample that reached its limit."""
    usage = generate_pb2.Usage(prompt_token_count=NUM_PROMPT_TOKENS, output_token_count=num_tokens)
    return generate_pb2.GenerateResponse(
        finished=generate_pb2.Finished(
            finish_reason=generate_pb2.FINISH_REASON_LENGTH, usage=usage, sample_index=sample_index
        )
    )


def mixed_samples(
    server: ScriptedServer, request: generate_pb2.GenerateRequest, context: Any
) -> Any:
    """Deltas of all `n` samples mixed, the last sample finished first."""
    count = request.sampling_params.n
    yield generate_pb2.GenerateResponse(started=generate_pb2.Started(request_id="r", seed=7))
    for word in ("I am ", "number "):
        for index in range(count):
            delta = generate_pb2.Delta(text=word, token_ids=[index], sample_index=index)
            yield generate_pb2.GenerateResponse(delta=delta)
    for index in reversed(range(count)):
        yield finished(2, index)


def scores(server: ScriptedServer, request: generate_pb2.GenerateRequest, context: Any) -> Any:
    """Log-probabilities of the prompt, in pieces of two tokens, then one token.

    A text's tokens are its words, each with the white space before it; the id is its length. A
    token's log-probability is -id / 4; even ids are the most likely at their place.
    """
    prompt = list(request.token_ids.ids)
    if request.HasField("text"):
        prompt = [len(word) for word in re.findall(r"\s*\S+|\s+$", request.text)]
    yield generate_pb2.GenerateResponse(
        started=generate_pb2.Started(request_id="r", prompt_token_count=len(prompt))
    )
    if request.sampling_params.HasField("prompt_logprobs"):
        for first in range(1, len(prompt), 2):
            yield generate_pb2.GenerateResponse(
                prompt_logprobs=_prompt_piece(prompt[first : first + 2], first)
            )
    delta = generate_pb2.Delta(text="x", token_ids=[9])
    yield generate_pb2.GenerateResponse(delta=delta)
    yield finished(1)


def _prompt_piece(ids: Sequence[int], first_position: int) -> generate_pb2.PromptLogprobs:
    entries = [
        generate_pb2.TokenLogprobs(
            logprob=-token / 4,
            top_token_ids=[token + token % 2],
            top_logprobs=[-token / 4 if token % 2 == 0 else 0.0],
        )
        for token in ids
    ]
    return generate_pb2.PromptLogprobs(
        first_position=first_position, token_ids=ids, logprobs=entries
    )


@contextlib.contextmanager
def serving(
    server: ScriptedServer, address: str = "127.0.0.1:0", credentials: Any = None
) -> Iterator[str]:
    """Serves for the length of the block, whose end breaks what is in flight; gives the address."""
    with ThreadPoolExecutor(32) as executor:
        instance = grpc.server(executor, options=[("grpc.so_reuseport", 0)])
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(server, instance)
        if credentials is None:
            port = instance.add_insecure_port(address)
        else:
            port = instance.add_secure_port(address, credentials)
        instance.start()
        try:
            yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
        finally:
            instance.stop(None).wait(WAIT_S)
            server.cancelled.set()
