"""What is measured of requests: their own times, and the engine's metrics."""

import asyncio

from tests.helpers.engine_harness import running_group
from tests.helpers.fake_worker import FakeSettings, expected_output


def test_times_tell_where_a_request_was() -> None:
    async def run() -> None:
        async with running_group(max_batch_tokens=8, max_num_seqs=2) as group:
            group.submit(1, [1] * 30, 10)
            await group.heard.end_of(1)
            group.submit(2, [2], 4, resume=expected_output([2], 2))
            await group.heard.end_of(2)
            times = group.heard.ended[1][0].times
            # The first token comes with the last of 4 chunks.
            assert times.step_count == 3 + 10
            assert times.queue_seconds >= 0
            assert times.prefill_seconds > 0 and times.decode_seconds > 0
            assert times.epoch == group.heard.states[-1].server.epoch
            assert group.heard.ended[2][0].times.step_count == 2

    asyncio.run(run())


def test_preemptions_are_counted_in_the_times() -> None:
    async def run() -> None:
        async with running_group([FakeSettings(num_blocks=13)]) as group:
            for handle in range(1, 5):
                group.submit(handle, [handle] * 6, 20)
            await group.heard.end_of(1, 2, 3, 4)
            counts = [group.heard.ended[h][0].times.preemption_count for h in range(1, 5)]
            assert sum(counts) == group.metrics.preemptions > 0
            assert counts[0] == 0, "the first by precedence never loses its place"
            for handle in range(1, 5):
                times = group.heard.ended[handle][0].times
                assert times.step_count >= 20

    asyncio.run(run())


def test_what_waits_and_who_has_no_client_is_measured() -> None:
    async def run() -> None:
        settings = FakeSettings()
        async with running_group([settings], max_num_seqs=1) as group:
            settings.is_stalled = True
            group.submit(1, [1], 9)
            await group.heard.until(lambda: group.metrics.num_requests_running == 1)
            group.submit(2, [1] * 5, 9, tenant="a")
            group.submit(3, [1] * 6, 9, tenant="b")
            group.book.tick(asyncio.get_running_loop().time())
            assert group.metrics.queue_prompt_tokens == 11
            assert group.metrics.num_tenants_waiting == 2
            group.book.alive(0, 3)
            assert group.metrics.requests_without_client == 0
            group.book.alive(0, 2)
            assert group.metrics.requests_without_client == 1
            group.workers[0].release_stall()
            await group.heard.end_of(1, 2, 3)
            group.book.alive(0, 0)
            assert group.metrics.requests_without_client == 0
            group.book.tick(asyncio.get_running_loop().time())
            assert group.metrics.queue_prompt_tokens == group.metrics.num_tenants_waiting == 0
            assert group.metrics.predicted_ttft > 0
            assert group.metrics.request_queue_time.count == 3

    asyncio.run(run())


def test_requests_are_measured() -> None:
    async def run() -> None:
        async with running_group() as group:
            group.submit(1, [1, 2, 3], 5)
            group.submit(2, [1], 2)
            await group.heard.end_of(1, 2)
            metrics = group.metrics
            assert metrics.prompt_tokens == 4
            assert metrics.generation_tokens == 7
            assert metrics.time_to_first_token.count == 2
            assert metrics.inter_token_latency.count == 5
            assert metrics.e2e_latency.count == 2
            assert metrics.request_success == {"length": 2}
            assert 0 < metrics.time_to_first_token.sum < 10

    asyncio.run(run())
