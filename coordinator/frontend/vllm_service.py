"""`vllm.grpc.engine.VllmEngine`: what an existing HTTP gateway speaks, over the calls of our own.

A thin translation. Requests become those of `lockstep.v1` and take the same path: the same checks,
the same engine, the same ends. Methods that are not here answer UNIMPLEMENTED.
"""

import asyncio
import datetime
import time
from collections.abc import Callable
from typing import Any

import grpc

from coordinator.errors import BadRequest
from coordinator.frontend.availability import Availability
from coordinator.frontend.checkpoint_text import CheckpointText
from coordinator.frontend.errors import RequestFailed
from coordinator.frontend.generate_service import GenerateService
from coordinator.frontend.request_preparer import check_request_id
from coordinator.frontend.services import VLLM_ENGINE, Method, service_handler
from coordinator.frontend.slow_clients import SlowClientWatch
from coordinator.frontend.tokenizer_archive import TokenizerPieces
from coordinator.frontend.vllm_answer import VllmAnswer
from coordinator.frontend.vllm_info import checkpoint_info, loads, server_info
from coordinator.frontend.vllm_request import dialect_of, in_callers_words, lockstep_request
from protos.lockstep.v1 import generate_pb2
from protos.vllm_engine import vllm_engine_pb2

_MAX_ABORTS = 1024


class VllmService:
    """The calls of the protocol that we have. One a frontend; all on its event loop."""

    def __init__(
        self,
        calls: GenerateService,
        availability: Availability,
        text: CheckpointText,
        served_model_name: str,
        slow_clients: SlowClientWatch,
    ) -> None:
        self._calls = calls
        self._availability = availability
        self._text = text
        self._model = checkpoint_info(text, served_model_name)
        self._slow_clients = slow_clients
        self._started = time.monotonic()
        self._tokenizer = TokenizerPieces(text.model_dir)

    def handler(self, count_rejected: Callable[[str], None]) -> grpc.ServiceRpcHandler:
        """What a server is given to serve these calls; `count_rejected` is told of refusals."""
        methods: dict[str, Method] = {
            "Generate": self.generate,
            "Abort": self.abort,
            "HealthCheck": self.health_check,
            "GetModelInfo": self.get_model_info,
            "GetServerInfo": self.get_server_info,
            "GetLoads": self.get_loads,
            "GetTokenizer": self.get_tokenizer,
        }
        return service_handler(VLLM_ENGINE, methods, count_rejected)

    async def generate(self, request: vllm_engine_pb2.GenerateRequest, context: Any) -> None:
        """Streams chunks, then one `complete` an output, whose counts are known only at the end."""
        try:
            asked = lockstep_request(request)
            async with self._calls.open_call(
                f"{VLLM_ENGINE.full_name}/Generate", asked, context, dialect_of(request)
            ) as call:
                answer = VllmAnswer(request.stream, call.num_samples)
                async with self._slow_clients.watch(call.streams):
                    while not call.is_done:
                        for event in await call.next_events():
                            chunk = answer.add(event)
                            if chunk is not None:
                                await context.write(chunk)
            for complete in answer.completes(call.cached_token_count):
                await context.write(complete)
        except (BadRequest, RequestFailed) as error:
            raise in_callers_words(error) from None

    async def abort(
        self, request: vllm_engine_pb2.AbortRequest, context: Any
    ) -> vllm_engine_pb2.AbortResponse:
        """Ends each by its name; ids that are not in flight are nothing unusual."""
        names = request.request_ids
        if len(names) > _MAX_ABORTS:
            raise BadRequest("request_ids", len(names), f"at most {_MAX_ABORTS}", "number of")
        for index, name in enumerate(names):
            check_request_id(name, f"request_ids[{index}]")  # all or none
        asked = (generate_pb2.AbortRequest(request_id=name) for name in names)
        await asyncio.gather(*(self._calls.abort(one, context) for one in asked))
        return vllm_engine_pb2.AbortResponse()

    async def health_check(
        self, request: vllm_engine_pb2.HealthCheckRequest, context: Any
    ) -> vllm_engine_pb2.HealthCheckResponse:
        """Healthy, or UNAVAILABLE with the cause.

        An answer that says "not healthy" would let a gateway register us before we can tell what
        the model takes, and it asks only once.
        """
        self._availability.require_ready()
        return vllm_engine_pb2.HealthCheckResponse(healthy=True)

    async def get_model_info(
        self, request: vllm_engine_pb2.GetModelInfoRequest, context: Any
    ) -> vllm_engine_pb2.GetModelInfoResponse:
        """What the model can take; UNAVAILABLE until the group has said its limits."""
        self._availability.require_ready()
        response = vllm_engine_pb2.GetModelInfoResponse()
        response.CopyFrom(self._model)
        response.max_context_length = self._availability.max_model_len
        response.max_req_input_len = self._availability.max_model_len - 1
        response.vocab_size = self._availability.vocab_size
        return response

    async def get_server_info(
        self, request: vllm_engine_pb2.GetServerInfoRequest, context: Any
    ) -> vllm_engine_pb2.GetServerInfoResponse:
        """The engine's last report, at most a second old."""
        uptime = time.monotonic() - self._started
        return server_info(self._availability.server_response, uptime)

    async def get_loads(
        self, request: vllm_engine_pb2.GetLoadsRequest, context: Any
    ) -> vllm_engine_pb2.GetLoadsResponse:
        """The engine's last report, at most a second old."""
        if request.dp_rank:
            raise BadRequest("dp_rank", request.dp_rank, "unset or 0: there is one scheduler")
        return loads(self._availability.server_response, datetime.datetime.now(datetime.UTC))

    async def get_tokenizer(
        self, request: vllm_engine_pb2.GetTokenizerRequest, context: Any
    ) -> None:
        """Streams the archive. FAILED_PRECONDITION without a tokenizer."""
        self._text.require_tokenizer()
        for chunk in await self._tokenizer.get():
            await context.write(chunk)
