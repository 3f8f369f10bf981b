"""What may wait: bounds, and deadlines against what is foreseen."""

import grpc
import pytest

from coordinator.admission import Refused
from coordinator.admission_control import AdmissionControl, QueueLimits
from coordinator.batch import Batch
from coordinator.batch_limits import BatchLimits
from tests.unit.coordinator.test_request_queue import make_request

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
NOW = 1000.0


def make_control(
    max_requests: int = 100,
    max_prompt_tokens: int = 10**6,
    max_time_s: float = 0.0,
    *,
    is_measured: bool = True,
) -> tuple[AdmissionControl, Batch]:
    """100 prompt tokens take a second; the batch is empty."""
    batch = Batch(1, BatchLimits(1000, 16, 8, 100))
    control = AdmissionControl(batch, QueueLimits(max_requests, max_prompt_tokens, max_time_s))
    if is_measured:
        for _ in range(10):
            control.predictor.observe_step(100, 1.0)
    return control, batch


def fill(batch: Batch, num_requests: int, tenant: str = "", prompt_len: int = 100) -> None:
    for order in range(num_requests):
        batch.enqueue(make_request(order, tenant, prompt_len))


def check(
    control: AdmissionControl, seconds_left: float, tenant: str = "", order: int = 999
) -> None:
    request = make_request(order, tenant, 100)
    request.deadline = NOW + seconds_left
    control.check(request, NOW)


def test_a_deadline_that_cannot_be_met_is_refused_with_the_prediction_and_when_to_retry() -> None:
    control, batch = make_control()
    fill(batch, 4)
    check(control, 5.1)
    with pytest.raises(Refused) as refused:
        check(control, 3.0)
    assert (refused.value.status, refused.value.reason) == (EXHAUSTED, "deadline")
    assert "predicted in 5.00 s, the deadline passes in 3.00 s" in str(refused.value)
    assert refused.value.retry_after_s == pytest.approx(2.0)


def test_nothing_is_refused_on_no_data() -> None:
    control, batch = make_control(is_measured=False)
    fill(batch, 50)
    check(control, 1e-3)


def test_without_a_deadline_any_wait_will_do() -> None:
    control, batch = make_control()
    fill(batch, 50)
    control.check(make_request(999), NOW)


def test_a_deadline_that_has_passed_is_said_to_have_passed() -> None:
    control, _ = make_control(is_measured=False)
    with pytest.raises(Refused, match=r"deadline passed 2.50 s before") as refused:
        check(control, -2.5)
    assert refused.value.status is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_flood_of_one_tenant_is_not_ahead_of_another_and_urgency_overtakes() -> None:
    control, batch = make_control()
    fill(batch, 50, "flood")
    check(control, 1.1, "other")
    check(control, 1.1, "flood", order=-1)
    with pytest.raises(Refused, match="predicted in 51.00 s"):
        check(control, 1.1, "flood")


def test_prompts_that_are_partly_prefilled_are_ahead() -> None:
    control, batch = make_control()
    fill(batch, 1, prompt_len=450)
    assert batch.next_command()  # 100 of them
    with pytest.raises(Refused, match="predicted in 5.5"):
        check(control, 1.0)


def test_a_prompt_that_was_sent_is_ahead_until_its_step_is_reported() -> None:
    control, batch = make_control(max_time_s=0.5)
    fill(batch, 1)
    assert batch.next_command()
    with pytest.raises(Refused, match=r"a wait of 1.01 s is predicted"):
        control.check(make_request(999, prompt_len=1), NOW)
    assert batch.pop_prompt_tokens(1) == 100
    control.check(make_request(999), NOW)


def test_after_a_rush_the_limit_on_the_wait_knows_that_no_slot_is_about_to_come_free() -> None:
    control, batch = make_control(max_time_s=1.0)
    requests = [make_request(order, prompt_len=10) for order in range(8)]
    for request in requests:
        batch.enqueue(request)
    assert batch.next_command() and batch.pop_prompt_tokens(1)
    for place, request in enumerate(requests):
        request.first_chunk_time = NOW - 4.0 + 0.1 * place
        request.output_ids = [1] * 10
    for _ in range(10):
        control.predictor.observe_stay(4.0, 40)
    with pytest.raises(Refused, match=r"a wait of 12.00 s is predicted"):
        control.check(make_request(999), NOW)
    requests[0].output_ids = [1] * 39  # as if it had begun much earlier
    control.check(make_request(999), NOW)
    batch.enqueue(make_request(998, prompt_len=1))  # which gets that slot
    with pytest.raises(Refused, match=r"a wait of 11.70 s is predicted"):
        control.check(make_request(999), NOW)


def test_a_queue_of_too_many_requests_is_full_until_one_is_predicted_to_leave() -> None:
    control, batch = make_control(max_requests=3)
    for order in range(100, 108):
        batch.enqueue(make_request(order, prompt_len=10))
    assert batch.next_command() and batch.num_running == 8
    for _ in range(10):
        control.predictor.observe_stay(16.0, 16)
    fill(batch, 2)
    control.check(make_request(999), NOW)
    batch.enqueue(make_request(998))
    with pytest.raises(Refused, match="the queue is full: 3 requests wait") as refused:
        control.check(make_request(999), NOW)
    assert (refused.value.status, refused.value.reason) == (EXHAUSTED, "queue_full")
    assert refused.value.retry_after_s == pytest.approx(2.0)


def test_a_queue_of_too_many_prompt_tokens_is_full_naming_the_numbers() -> None:
    control, batch = make_control(max_prompt_tokens=450)
    control.check(make_request(1, prompt_len=9000), NOW)  # one alone may always wait
    fill(batch, 4)
    control.check(make_request(999, prompt_len=50), NOW)
    words = "400 prompt tokens wait, with the 51 of this request there would be more than 450"
    with pytest.raises(Refused, match=words) as refused:
        control.check(make_request(999, prompt_len=51), NOW)
    assert (refused.value.status, refused.value.reason) == (EXHAUSTED, "queue_full")
    assert refused.value.retry_after_s > 0


def test_a_wait_above_the_limit_is_refused_but_never_for_the_length_of_a_prompt_itself() -> None:
    control, batch = make_control(max_time_s=2.0)
    control.check(make_request(999, prompt_len=5000), NOW)  # 50 s of its own
    fill(batch, 2)
    control.check(make_request(999, prompt_len=5000), NOW)
    batch.enqueue(make_request(998, prompt_len=50))
    words = r"a wait of 2.50 s is predicted, the limit is 2 s"
    with pytest.raises(Refused, match=words) as refused:
        control.check(make_request(999, prompt_len=100), NOW)
    assert (refused.value.status, refused.value.reason) == (EXHAUSTED, "queue_time")
    assert refused.value.retry_after_s == pytest.approx(0.5)


def test_a_retry_delay_is_told_though_nothing_was_measured() -> None:
    control, batch = make_control(max_requests=1, is_measured=False)
    fill(batch, 1)
    with pytest.raises(Refused) as refused:
        control.check(make_request(999), NOW)
    assert refused.value.retry_after_s == 1.0


def test_the_prediction_that_is_exported_is_for_the_end_of_the_queue() -> None:
    control, batch = make_control()
    idle = control.time_to_first_token(NOW)
    fill(batch, 4)
    assert control.time_to_first_token(NOW) == pytest.approx(idle + 3.01)
