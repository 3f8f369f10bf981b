"""The whole engine over fake ranks: requests, state, and how frontends are started."""

import asyncio
import json
import os
from pathlib import Path

import grpc

from coordinator.frontend_link import frontend_command
from protos.lockstep.v1 import engine_pb2
from tests.helpers.engine_harness import LIMIT_S, make_config, make_submit
from tests.helpers.fake_worker import expected_output
from tests.helpers.whole_engine import running_engine


def test_requests_of_several_frontends_get_their_own_tokens() -> None:
    async def run() -> None:
        async with running_engine(num_frontends=2) as running:
            first = await running.ready()
            second = await running.frontend(1)
            assert (first.port, second.port) == (50051, 4711)
            second.send(listening=engine_pb2.Listening(port=4711))
            for frontend, start in ((first, 1), (second, 2)):
                submit = make_submit(1, [start], 9, request_id=str(start))
                frontend.send(submit=submit)
            for frontend, start in ((first, 1), (second, 2)):
                await frontend.heard.end_of(1)
                assert frontend.heard.tokens[1] == expected_output([start], 9)

    asyncio.run(run())


def test_abort_reaches_another_frontends_request() -> None:
    async def run() -> None:
        async with running_engine(num_frontends=2) as running:
            first = await running.ready()
            second = await running.frontend(1)
            first.send(submit=make_submit(1, [1], 250, request_id="long"))
            second.send(abort=engine_pb2.AbortByName(query=5, request_id="long"))
            await second.heard.until(lambda: bool(second.heard.outcomes))
            assert second.heard.outcomes[0].query == 5
            if second.heard.outcomes[0].was_active:
                await first.heard.end_of(1)

    asyncio.run(run())


def test_a_request_that_its_frontend_has_lost_is_seen_until_it_ends() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            first.send(submit=make_submit(1, [1], 250))
            first.send(alive=engine_pb2.Alive(stream_count=0))  # it has forgotten the request
            first.send(abort=engine_pb2.AbortByName(query=1, request_id="no such"))
            await first.heard.until(lambda: bool(first.heard.outcomes))
            assert running.metrics.requests_without_client == 1
            first.send(release=engine_pb2.Release(handle=1, reason="cancelled"))
            first.send(alive=engine_pb2.Alive(stream_count=0))
            await first.heard.end_of(1)
            first.send(abort=engine_pb2.AbortByName(query=2, request_id="no such"))
            await first.heard.until(lambda: len(first.heard.outcomes) == 2)
            assert running.metrics.requests_without_client == 0

    asyncio.run(run())


def test_before_the_group_is_up_requests_are_refused_as_unavailable() -> None:
    async def run() -> None:
        async with running_engine() as running:
            for worker in running.workers:
                await worker.stop()
            first = await running.frontend()
            first.send(submit=make_submit(1, [1], 2))
            await first.heard.end_of(1)
            assert first.heard.ended[1][0].status_code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "not ready" in first.heard.ended[1][0].status_message
            assert not first.heard.states[0].is_ready

    asyncio.run(run())


def test_the_state_comes_at_least_once_a_second_and_tells_the_ranks() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            seen = len(first.heard.states)
            await first.heard.until(lambda: len(first.heard.states) >= seen + 2, limit_s=2.5)
            state = first.heard.states[-1]
            assert (state.max_model_len, state.vocab_size) == (512, 1000)
            assert [rank.address for rank in state.server.ranks] == [
                worker.address for worker in running.workers
            ]
            assert all(rank.is_up and rank.pid == os.getpid() for rank in state.server.ranks)
            assert (state.server.block_count, state.server.block_size) == (256, 4)

    asyncio.run(run())


def test_the_ready_file_says_where_once_the_model_can_answer(tmp_path: Path) -> None:
    async def run() -> None:
        ready_file = tmp_path / "ready.json"
        async with running_engine(ready_file=str(ready_file)) as running:
            await running.frontend()
            assert not ready_file.exists()
            await running.ready()
            async with asyncio.timeout(LIMIT_S):
                while not ready_file.exists():
                    await asyncio.sleep(0.005)
            told = json.loads(ready_file.read_text())
            assert (told["role"], told["rank"]) == ("coordinator", None)
            assert (told["grpc"], told["metrics"]) == ("127.0.0.1:4711", "127.0.0.1:9999")

    asyncio.run(run())


def test_rejections_of_frontends_are_counted() -> None:
    async def run() -> None:
        async with running_engine() as running:
            first = await running.ready()
            first.send(rejected=engine_pb2.Rejected(reason="invalid_argument", count=3))
            first.send(submit=make_submit(1, [1], 1))
            await first.heard.end_of(1)
            assert running.metrics.requests_rejected == {"invalid_argument": 3}

    asyncio.run(run())


def test_a_frontend_is_started_as_it_expects() -> None:
    config = make_config(["a:1"], model=Path("/m"), step_timeout=9.0, num_frontends=2)
    words = list(frontend_command(config, 7, 1234))
    assert words[1:3] == ["-m", "coordinator.frontend"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert flags == {
        "--engine-fd": "7",
        "--engine-pid": str(os.getpid()),
        "--model": "/m",
        "--served-model-name": "fake",
        "--host": "127.0.0.1",
        "--port": "1234",
        "--silence-timeout": "11.0",
        "--num-frontends": "2",
        "--slow-client-seconds": "30.0",
        "--tls-cert": "",
        "--tls-key": "",
        "--tls-client-ca": "",
        "--api-keys": "",
        "--max-connections": "4096",
        "--max-concurrent-streams": "2048",
        "--log-format": "text",
        "--otlp-endpoint": "",
    }
