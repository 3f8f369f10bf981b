"""The client, and the commands over it, against a scripted server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import grpc
import pytest

from lockstep import chat, generate
from lockstep.client import Client, chat_request, ids_request, text_request
from lockstep.errors import CallFailed
from protos.lockstep.v1 import generate_pb2, generate_pb2_grpc

_WAIT_S = 20.0


class ScriptedServer(generate_pb2_grpc.GenerateServiceServicer):
    """Says "Hi there"; waits for ever on "wait", fails in the middle on "fail"."""

    def __init__(self) -> None:
        self.requests: list[generate_pb2.GenerateRequest] = []
        self.cancelled = Event()

    def Generate(self, request: generate_pb2.GenerateRequest, context: Any) -> Iterator[Any]:
        self.requests.append(request)
        context.set_trailing_metadata((("lockstep-queue-ms", "1.500"), ("other", "x")))
        if request.sampling_params.n > 1:
            yield from _samples(request.sampling_params.n)
            return
        yield generate_pb2.GenerateResponse(
            started=generate_pb2.Started(request_id="r", seed=7, prompt_token_count=3)
        )
        yield generate_pb2.GenerateResponse(delta=generate_pb2.Delta(text="Hi ", token_ids=[4]))
        if request.text == "fail":
            context.abort(grpc.StatusCode.UNAVAILABLE, "rank 1 lost at step 5: Connection reset")
        if request.text == "wait":
            context.add_callback(self.cancelled.set)
            self.cancelled.wait(_WAIT_S)
            return
        yield generate_pb2.GenerateResponse(
            delta=generate_pb2.Delta(text="there", token_ids=[5, 6])
        )
        yield generate_pb2.GenerateResponse(
            finished=generate_pb2.Finished(
                finish_reason=generate_pb2.FINISH_REASON_LENGTH,
                usage=generate_pb2.Usage(prompt_token_count=3, output_token_count=3),
            )
        )

    def Abort(self, request: generate_pb2.AbortRequest, context: Any) -> Any:
        return generate_pb2.AbortResponse(was_active=request.request_id == "r")

    def GetServerInfo(self, request: Any, context: Any) -> Any:
        return generate_pb2.GetServerInfoResponse(version="9", epoch=2)


def _samples(count: int) -> Iterator[generate_pb2.GenerateResponse]:
    """Deltas of all samples mixed, the last sample finished first."""
    yield generate_pb2.GenerateResponse(started=generate_pb2.Started(request_id="r", seed=7))
    for word in ("I am ", "number "):
        for index in range(count):
            delta = generate_pb2.Delta(text=f"{word}", token_ids=[index], sample_index=index)
            yield generate_pb2.GenerateResponse(delta=delta)
    for index in reversed(range(count)):
        usage = generate_pb2.Usage(output_token_count=2)
        yield generate_pb2.GenerateResponse(
            finished=generate_pb2.Finished(usage=usage, sample_index=index)
        )


@pytest.fixture
def server() -> Iterator[tuple[ScriptedServer, str]]:
    scripted = ScriptedServer()
    with ThreadPoolExecutor(4) as executor:
        instance = grpc.server(executor)
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(scripted, instance)
        port = instance.add_insecure_port("127.0.0.1:0")
        instance.start()
        yield scripted, f"127.0.0.1:{port}"
        scripted.cancelled.set()
        instance.stop(None).wait(_WAIT_S)


def test_deltas_come_in_order_with_started_and_finished(server: Any) -> None:
    with Client(server[1]) as client:
        generation = client.generate(text_request("x", temperature=0.0, stop=["\n"]), 10.0)
        assert [delta.text for delta in generation] == ["Hi ", "there"]
        assert generation.started is not None and generation.started.seed == 7
        assert generation.finished is not None
        assert generation.finished.usage.output_token_count == 3
    (request,) = server[0].requests
    assert request.sampling_params.HasField("temperature")
    assert not request.sampling_params.HasField("top_p")
    assert list(request.sampling_params.stop) == ["\n"]


def test_failed_stream_gives_its_tokens_then_raises_the_status(server: Any) -> None:
    with Client(server[1]) as client:
        deltas = iter(client.generate(text_request("fail")))
        assert next(deltas).text == "Hi "
        with pytest.raises(CallFailed, match="^UNAVAILABLE: rank 1 lost at step 5: C") as caught:
            next(deltas)
        assert caught.value.code == "UNAVAILABLE"


def test_cancel_reaches_the_server(server: Any) -> None:
    with Client(server[1]) as client:
        generation = client.generate(text_request("wait"))
        deltas = iter(generation)
        next(deltas)
        generation.cancel()
        assert server[0].cancelled.wait(_WAIT_S)
        with pytest.raises(CallFailed, match="CANCELLED"):
            next(deltas)


def test_deadline_ends_the_call(server: Any) -> None:
    with Client(server[1]) as client, pytest.raises(CallFailed, match="DEADLINE_EXCEEDED"):
        list(client.generate(text_request("wait"), timeout_s=0.3))


def test_no_server_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(CallFailed, match="UNAVAILABLE"):
        client.server_info()


def test_proxy_of_the_environment_is_not_used(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(server[1]) as client:
        assert client.server_info().epoch == 2
        assert client.abort("r") is True
        assert client.abort("other") is False


def test_requests_hold_one_prompt_each() -> None:
    chat_prompt = chat_request([{"role": "user", "content": "hi"}], seed=1)
    assert chat_prompt.chat.messages[0].content == "hi"
    assert list(ids_request([1, 2]).token_ids.ids) == [1, 2]


def test_generate_prints_text_as_it_comes(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--address", server[1], "--prompt", "x", "--top-k", "5", "--verbose"]
    assert generate.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == "Hi there\n"
    assert "3 prompt + 3 output tokens, ended by length" in shown.err
    assert server[0].requests[0].sampling_params.top_k == 5


def test_generate_prints_ids_when_asked(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--address", server[1], "--token-ids", "1,2", "--ids"]) == 0
    assert capsys.readouterr().out.split() == ["4", "5", "6"]
    assert list(server[0].requests[0].token_ids.ids) == [1, 2]


def test_generate_that_fails_says_why_and_exits_1(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--address", server[1], "--prompt", "fail"]) == 1
    assert "rank 1 lost at step 5" in capsys.readouterr().err


def test_samples_are_told_apart_and_finished_is_sample_0s(server: Any) -> None:
    with Client(server[1]) as client:
        generation = client.generate(text_request("x", n=3), 10.0)
        assert {delta.sample_index for delta in generation} == {0, 1, 2}
        assert sorted(generation.finished_samples) == [0, 1, 2]
        assert generation.finished == generation.finished_samples[0]


def test_times_are_the_servers_trailing_metadata_also_after_an_error(server: Any) -> None:
    with Client(server[1]) as client:
        generation = client.generate(text_request("x"), 10.0)
        list(generation)
        assert generation.times == {"lockstep-queue-ms": "1.500"}
        failing = client.generate(text_request("fail"), 10.0)
        with pytest.raises(CallFailed):
            list(failing)
        assert failing.times == {"lockstep-queue-ms": "1.500"}


def test_generate_prints_times_and_samples_when_asked(
    server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--address", server[1], "--prompt", "x", "--n", "2", "--times", "--verbose"]
    assert generate.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out == "--- 0\nI am number \n--- 1\nI am number \n"
    assert shown.err.startswith("queue-ms 1.500\n")
    assert "4 output tokens" in shown.err


def test_generate_sets_the_request_fields_that_are_given(server: Any) -> None:
    words = ["--address", server[1], "--prompt", "x"]
    assert generate.main(words) == 0
    given = [*words, "--priority", "-3", "--tenant", "acme", "--no-prefix-cache"]
    assert generate.main(given) == 0
    plain, telling = server[0].requests
    assert not plain.HasField("use_prefix_cache") and not plain.tenant and not plain.priority
    assert (telling.priority, telling.tenant) == (-3, "acme")
    assert telling.HasField("use_prefix_cache") and not telling.use_prefix_cache


def test_chat_keeps_the_conversation(
    server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "", "and now?"])

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert chat.main(["--address", server[1], "--system", "be kind"]) == 0
    turns = [(m.role, m.content) for m in server[0].requests[-1].chat.messages]
    assert turns == [
        ("system", "be kind"),
        ("user", "hello"),
        ("assistant", "Hi there"),
        ("user", "and now?"),
    ]
