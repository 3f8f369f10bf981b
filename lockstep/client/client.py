"""The synchronous client."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from lockstep.client.channel import call_metadata, open_channel
from lockstep.client.config import ClientConfig
from lockstep.client.generation import Generation
from lockstep.client.pauses import Pauses
from lockstep.client.progress import StreamProgress
from lockstep.client.requests import Chat, ChatMessage, GenerateRequest, SamplingParams
from lockstep.client.results import Completion, ModelInfo, Score, ServerInfo
from lockstep.client.retries import Retries, require_no_output
from lockstep.client.scoring import ScoredPair, ScoredText, score_of, scored_pair
from lockstep.client.statuses import call_failed
from lockstep.client.wire import completion_of, model_info_of, request_message, server_info_of
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_T = TypeVar("_T")
_R = TypeVar("_R")


class Client:
    """A connection to one server, for any number of threads. Closed by `close` or `with`.

    Calls raise CallFailed (lockstep/errors.py has its subclasses) when they end with a status, and
    TypeError or ValueError for a request that cannot be sent. Every call has a limit in seconds:
    its own `timeout_s` or the config's, retries included.
    """

    def __init__(self, address: str, config: ClientConfig | None = None) -> None:
        """`address` is host:port; nothing is sent yet. Proxies of the environment are not used.

        Raises ConfigError if a TLS file cannot be read.
        """
        self._config = config or ClientConfig()
        self._metadata = call_metadata(self._config)
        self._channel = open_channel(address, self._config)
        self._stub = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._pauses = Pauses()

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
        """Ends what is in flight with Cancelled and frees the connection. Idempotent."""
        self._pauses.close()
        self._channel.close()

    def generate(
        self, request: GenerateRequest, timeout_s: float | None = None, resume: bool | None = None
    ) -> Generation:
        """Starts a streaming call. Errors of the server come from the iteration.

        With `resume` (None: as configured) a stream that breaks goes on, with the same seed, from
        what was delivered; without, it is tried again only before its first token.
        """
        may_resume = self._config.resume if resume is None else resume
        return Generation(
            StreamProgress(request, may_resume),
            self._retries(timeout_s),
            self._open_stream,
            self._pauses,
        )

    def chat(
        self,
        messages: Sequence[ChatMessage],
        sampling: SamplingParams | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """Starts the answer to a conversation."""
        request = GenerateRequest(Chat(messages), sampling or SamplingParams())
        return self.generate(request, timeout_s)

    def generate_unary(
        self, request: GenerateRequest, timeout_s: float | None = None
    ) -> Completion:
        """The whole output at once."""
        message = generate_pb2.GenerateUnaryRequest(request=request_message(request))
        retries = self._retries(timeout_s)
        return completion_of(self._called(self._stub.GenerateUnary, message, retries))

    def abort(self, request_id: str, tenant: str = "") -> bool:
        """Ends a tenant's request by its name; True if it was in flight."""
        message = generate_pb2.AbortRequest(request_id=request_id, tenant=tenant)
        retries = self._retries(self._config.info_timeout_s)
        answer = self._called(self._stub.Abort, message, retries)
        return bool(answer.was_active)

    def model_info(self) -> ModelInfo:
        """What the model can take."""
        message = generate_pb2.GetModelInfoRequest()
        retries = self._retries(self._config.info_timeout_s)
        return model_info_of(self._called(self._stub.GetModelInfo, message, retries))

    def server_info(self) -> ServerInfo:
        """Version, ranks, load."""
        message = generate_pb2.GetServerInfoRequest()
        retries = self._retries(self._config.info_timeout_s)
        return server_info_of(self._called(self._stub.GetServerInfo, message, retries))

    def score(
        self, context: ScoredText, continuation: ScoredText, timeout_s: float | None = None
    ) -> Score:
        """How likely `continuation` is after `context`: both texts, or both token ids.

        Texts cost a second call, which counts the context's tokens. `timeout_s` limits each call.
        """
        pair = scored_pair(context, continuation)
        return self._score(pair, self._num_context_tokens(pair, timeout_s), timeout_s)

    def loglikelihood(
        self,
        pairs: Iterable[tuple[ScoredText, ScoredText]],
        num_parallel: int = 16,
        timeout_s: float | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, is greedy) of each (context, continuation), in order.

        `num_parallel` calls at a time; the context of several pairs is counted once. The first
        failure ends the rest.
        """
        scored = [scored_pair(context, continuation) for context, continuation in pairs]
        firsts = {pair.context: pair for pair in scored}
        counted = _parallel(
            lambda pair: self._num_context_tokens(pair, timeout_s), firsts.values(), num_parallel
        )
        counts = dict(zip(firsts, counted, strict=True))
        scores = _parallel(
            lambda pair: self._score(pair, counts[pair.context], timeout_s), scored, num_parallel
        )
        return [(score.logprob, score.is_greedy) for score in scores]

    def _num_context_tokens(self, pair: ScoredPair, timeout_s: float | None) -> int:
        request = pair.count_request()
        counted = None if request is None else self.generate_unary(request, timeout_s)
        return pair.num_context_tokens(counted)

    def _score(self, pair: ScoredPair, num_context_tokens: int, timeout_s: float | None) -> Score:
        return score_of(self.generate_unary(pair.request(), timeout_s), num_context_tokens)

    def _retries(self, timeout_s: float | None) -> Retries:
        limit_s = self._config.timeout_s if timeout_s is None else timeout_s
        return Retries(self._config.retry, limit_s)

    def _open_stream(self, message: generate_pb2.GenerateRequest, timeout_s: float) -> Any:
        return self._open(self._stub.Generate, message, timeout_s)

    def _called(self, method: Callable[..., Any], message: Any, retries: Retries) -> Any:
        """The answer of a unary call, tried again while that is of use."""
        while True:
            try:
                return self._open(method, message, retries.remaining_s())
            except grpc.RpcError as error:
                failed, metadata = call_failed(error), error.trailing_metadata()
            require_no_output(failed, metadata)
            self._pauses.pause(retries.delay_s(failed))

    def _open(self, method: Callable[..., Any], message: Any, timeout_s: float) -> Any:
        self._pauses.check()
        try:
            return method(message, timeout=timeout_s, metadata=self._metadata)
        except ValueError:
            self._pauses.check()  # gRPC's answer to a channel that was closed just now
            raise


def _parallel(work: Callable[[_T], _R], items: Iterable[_T], num_threads: int) -> list[_R]:
    """The results in order; raises the first failure in order and begins nothing more."""
    pool = ThreadPoolExecutor(num_threads)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)
