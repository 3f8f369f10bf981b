"""The asynchronous client."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from lockstep.client.async_generation import AsyncGeneration, raise_if_not_the_tasks_own
from lockstep.client.channel import call_metadata, open_async_channel
from lockstep.client.config import ClientConfig
from lockstep.client.progress import StreamProgress
from lockstep.client.requests import Chat, ChatMessage, GenerateRequest, SamplingParams
from lockstep.client.results import Completion, ModelInfo, Score, ServerInfo
from lockstep.client.retries import Retries, require_no_output
from lockstep.client.scoring import ScoredPair, ScoredText, score_of, scored_pair
from lockstep.client.statuses import call_failed, failure
from lockstep.client.wire import completion_of, model_info_of, request_message, server_info_of
from lockstep.errors import CallFailed
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_T = TypeVar("_T")
_R = TypeVar("_R")


class AsyncClient:
    """`Client` for an event loop: the same calls, awaited. Made, used and closed in one loop."""

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """`address` is host:port; nothing is sent yet. Raises ConfigError."""
        self._config = config or ClientConfig()
        self._metadata = call_metadata(self._config)
        self._channel = open_async_channel(address, self._config)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends what is in flight and frees the connection. Idempotent."""
        self._is_closed = True
        await self._channel.close()

    def generate(
        self, request: GenerateRequest, timeout_s: float | None = None, resume: bool | None = None
    ) -> AsyncGeneration:
        """Starts a streaming call; as Client.generate."""
        may_resume = self._config.resume if resume is None else resume
        return AsyncGeneration(
            StreamProgress(request, may_resume),
            self._retries(timeout_s),
            self._open_stream,
        )

    def chat(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGeneration:
        """Starts the answer to a conversation."""
        request = GenerateRequest(Chat(messages), sampling or SamplingParams())
        return self.generate(request, timeout_s)

    async def generate_unary(
        self, request: GenerateRequest, timeout_s: float | None = None
    ) -> Completion:
        """The whole output at once."""
        message = generate_pb2.GenerateUnaryRequest(request=request_message(request))
        retries = self._retries(timeout_s)
        return completion_of(await self._called(self._stub.GenerateUnary, message, retries))

    async def abort(self, request_id: str, tenant: str = "") -> bool:
        """Ends a tenant's request by its name; True if it was in flight."""
        message = generate_pb2.AbortRequest(request_id=request_id, tenant=tenant)
        retries = self._retries(self._config.info_timeout_s)
        answer = await self._called(self._stub.Abort, message, retries)
        return bool(answer.was_active)

    async def model_info(self) -> ModelInfo:
        """What the model can take."""
        message = generate_pb2.GetModelInfoRequest()
        retries = self._retries(self._config.info_timeout_s)
        return model_info_of(await self._called(self._stub.GetModelInfo, message, retries))

    async def server_info(self) -> ServerInfo:
        """Version, ranks, load."""
        message = generate_pb2.GetServerInfoRequest()
        retries = self._retries(self._config.info_timeout_s)
        return server_info_of(await self._called(self._stub.GetServerInfo, message, retries))

    async def score(
        self, context: ScoredText, continuation: ScoredText, timeout_s: float | None = None
    ) -> Score:
        """How likely `continuation` is after `context`; as Client.score."""
        pair = scored_pair(context, continuation)
        return await self._score(pair, await self._num_context_tokens(pair, timeout_s), timeout_s)

    async def loglikelihood(
        self,
        pairs: Iterable[tuple[ScoredText, ScoredText]],
        num_parallel: int = 16,
        timeout_s: float | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, is greedy) of each pair; as Client.loglikelihood."""
        scored = [scored_pair(context, continuation) for context, continuation in pairs]
        firsts = {pair.context: pair for pair in scored}
        counted = await _parallel(
            lambda pair: self._num_context_tokens(pair, timeout_s), firsts.values(), num_parallel
        )
        counts = dict(zip(firsts, counted, strict=True))
        scores = await _parallel(
            lambda pair: self._score(pair, counts[pair.context], timeout_s), scored, num_parallel
        )
        return [(score.logprob, score.is_greedy) for score in scores]

    async def _num_context_tokens(self, pair: ScoredPair, timeout_s: float | None) -> int:
        request = pair.count_request()
        counted = None if request is None else await self.generate_unary(request, timeout_s)
        return pair.num_context_tokens(counted)

    async def _score(
        self, pair: ScoredPair, num_context_tokens: int, timeout_s: float | None
    ) -> Score:
        return score_of(await self.generate_unary(pair.request(), timeout_s), num_context_tokens)

    def _retries(self, timeout_s: float | None) -> Retries:
        limit_s = self._config.timeout_s if timeout_s is None else timeout_s
        return Retries(self._config.retry, limit_s)

    def _open_stream(self, message: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
        return self._open(self._stub.Generate, message, timeout_s)

    async def _called(self, method: Callable[..., Any], message: Any, retries: Retries) -> Any:
        """The answer of a unary call, tried again while that is of use."""
        while True:
            try:
                return await self._open(method, message, retries.remaining_s())
            except grpc.RpcError as error:
                failed, metadata = call_failed(error), error.trailing_metadata()
            except asyncio.CancelledError:
                raise_if_not_the_tasks_own()
                raise
            require_no_output(failed, metadata)
            await asyncio.sleep(retries.delay_s(failed))

    def _open(self, method: Callable[..., Any], message: Any, timeout_s: float) -> Any:
        if self._is_closed:
            raise failure("CANCELLED", "the client is closed")
        return method(message, timeout=timeout_s, metadata=self._metadata)


async def _parallel(
    work: Callable[[_T], Awaitable[_R]], items: Iterable[_T], num_tasks: int
) -> list[_R]:
    """The results in order; the first failure ends the rest and is raised."""
    turns = asyncio.Semaphore(num_tasks)

    async def in_turn(item: _T) -> _R:
        async with turns:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_turn(item)) for item in items]
    except* CallFailed as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]
