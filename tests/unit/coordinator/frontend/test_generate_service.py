"""A frontend with a scripted engine behind it: streams, ends, stop texts."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.lockstep.v1 import engine_pb2, generate_pb2
from tests.unit.coordinator.frontend.fake_engine import (
    MAX_MODEL_LEN,
    MODEL_NAME,
    VOCAB_SIZE,
    Served,
    within,
    write_ids_only_model,
)
from tests.unit.coordinator.frontend.generate_calls import (
    all_events,
    collect,
    failure,
    ids_of,
    kinds,
    run,
    text_request,
)


def test_stream_is_started_deltas_finished_and_texts_join(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request("hello", seed=5, max_tokens=9))
        submit = await served.engine.next_submit()
        assert ids_of(submit.prompt_ids) == encode("hello")
        assert submit.sampling_params.seed == 5
        assert submit.sampling_params.max_tokens == 9
        assert ids_of(submit.stop_ids) == [7]
        output = encode("café 世界")
        for token_id in output:
            served.engine.send_outputs({submit.handle: [token_id]})
        served.engine.end(submit.handle)
        events = await collect(call)
        assert kinds(events)[0] == "started" and kinds(events)[-1] == "finished"
        assert set(kinds(events)[1:-1]) == {"delta"}
        assert events[0].started.seed == 5
        assert events[0].started.prompt_token_count == len(encode("hello"))
        deltas = [event.delta for event in events[1:-1]]
        assert "".join(delta.text for delta in deltas) == "café 世界"
        assert [token_id for delta in deltas for token_id in delta.token_ids] == output
        finished = events[-1].finished
        assert finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
        assert finished.usage.output_token_count == len(output)
        assert finished.usage.prompt_token_count == len(encode("hello"))

    run(model, script)


def test_started_comes_with_acceptance_before_any_token(model: Path) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request())
        submit = await served.engine.next_submit()
        served.engine.accept(submit.handle)
        events = aiter(call)
        event = await within(anext(events))
        assert event.started.request_id == submit.request_id
        served.engine.end(submit.handle, generate_pb2.FINISH_REASON_ABORTED)
        assert kinds(await collect(events)) == ["finished"]

    run(model, script)


def test_tokens_that_queue_are_joined_in_one_delta(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request())
        submit = await served.engine.next_submit()
        for token_id in encode("hello world"):
            served.engine.send_outputs({submit.handle: [token_id]})
        served.engine.end(submit.handle)
        assert len(await collect(call)) < 2 + len(encode("hello world"))

    run(model, script)


def test_unary_answer_is_the_stream_joined(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        call = served.stub.GenerateUnary(
            generate_pb2.GenerateUnaryRequest(request=text_request(seed=1))
        )
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: encode("he")})
        served.engine.send_outputs({submit.handle: [*encode("llo"), 7]})
        served.engine.end(submit.handle, generate_pb2.FINISH_REASON_STOP, stop_token_id=7)
        response = await within(call)
        assert response.started.seed == 1
        assert response.output.text == "hello"
        assert list(response.output.token_ids) == [*encode("he"), *encode("llo"), 7]
        assert response.finished.stop_token_id == 7
        assert response.finished.WhichOneof("matched_stop") == "stop_token_id"

    run(model, script)


def test_stop_text_finishes_at_once_and_releases_with_the_billed_count(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request(stop=["END"]))
        submit = await served.engine.next_submit()
        assert not submit.sampling_params.stop
        kept = encode("hello ")
        served.engine.send_outputs({submit.handle: [*kept, *encode("END and more")]})
        events = await collect(call)
        assert "".join(event.delta.text for event in events) == "hello "
        finished = events[-1].finished
        assert finished.finish_reason == generate_pb2.FINISH_REASON_STOP
        assert finished.stop == "END"
        assert finished.usage.output_token_count == len(kept)
        release = await served.engine.next_release()
        assert (release.handle, release.reason) == (submit.handle, "stop")
        assert release.output_token_count == len(kept)

    run(model, script)


CHOICE = generate_pb2.ChoiceConstraint(choices=["yes", "no"])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"json_schema": "{}"}, {"json_schema": "{}"}),
        ({"regex": "a+"}, {"regex": "a+"}),
        ({"lark_grammar": 'start: "a"'}, {"lark_grammar": 'start: "a"'}),
        ({"gbnf_grammar": 'root ::= "a"'}, {"gbnf_grammar": 'root ::= "a"'}),
        ({"choice": CHOICE}, {"choice": CHOICE}),
        ({"json_object": True}, {"json_object": True}),
        ({"json_object": False}, {}),
    ],
    ids=str,
)
def test_a_constraint_reaches_the_engine_and_no_json_object_is_none(
    model: Path, asked: dict[str, Any], told: dict[str, Any]
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request(**asked))
        submit = await served.engine.next_submit()
        kind = submit.sampling_params.WhichOneof("constraint")
        assert ({} if kind is None else {kind: getattr(submit.sampling_params, kind)}) == told
        call.cancel()

    run(model, script)


def test_pieces_of_the_prompts_log_probabilities_come_in_order_before_the_first_delta(
    model: Path,
) -> None:
    async def script(served: Served) -> None:
        call = served.stub.Generate(text_request(prompt_logprobs=0))
        submit = await served.engine.next_submit()
        pieces = [
            engine_pb2.PromptPiece(
                handle=submit.handle,
                first_position=position,
                token_ids=np.array([position], "<i4").tobytes(),
                logprobs=np.array([-0.5], "<f4").tobytes(),
            )
            for position in (1, 2, 3)
        ]
        for some in (pieces[:2], pieces[2:]):
            served.engine.send(outputs=engine_pb2.Outputs(prompt_pieces=some))
        served.engine.send_outputs({submit.handle: [40]})
        served.engine.end(submit.handle)
        events = await collect(call)
        expected = ["started", *["prompt_logprobs"] * 3, "delta", "finished"]
        assert kinds(events) == expected
        told = [event.prompt_logprobs for event in events[1:4]]
        assert [piece.first_position for piece in told] == [1, 2, 3]
        assert [list(piece.token_ids) for piece in told] == [[1], [2], [3]]

    run(model, script)


def test_bias_and_bad_words_reach_the_engine_and_the_stop_text_stays(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        params: dict[str, Any] = {"logit_bias": {5: -1.5, 2: 3.0}, "bad_words": ["hello"]}
        call = served.stub.Generate(text_request(stop=["END"], include_stop=True, **params))
        submit = await served.engine.next_submit()
        assert dict(submit.sampling_params.logit_bias) == {2: 3.0, 5: -1.5}
        assert [ids_of(word) for word in submit.bad_words] == [encode("hello"), encode(" hello")]
        served.engine.send_outputs({submit.handle: encode("oneENDtwo")})
        events = await collect(call)
        assert "".join(event.delta.text for event in events) == "oneEND"
        assert events[-1].finished.stop == "END"

    run(model, script)


def test_logprobs_travel_with_their_ids_beside_requests_without_any(
    model: Path, encode: Any
) -> None:
    async def script(served: Served) -> None:
        plain = served.stub.Generate(text_request())
        plain_submit = await served.engine.next_submit()
        wanting = served.stub.Generate(text_request(logprobs=1))
        wanting_submit = await served.engine.next_submit()
        gone = served.stub.Generate(text_request(logprobs=0))
        gone_submit = await served.engine.next_submit()
        gone.cancel()
        assert (await served.engine.next_release()).handle == gone_submit.handle
        ids = encode("abc")
        entries = [generate_pb2.TokenLogprobs(logprob=-float(i)) for i in range(6)]
        handles = (gone_submit.handle, plain_submit.handle, wanting_submit.handle)
        served.engine.send_outputs(dict.fromkeys(handles, ids), entries)
        for submit in (plain_submit, wanting_submit):
            served.engine.end(submit.handle)
        assert not any(event.delta.logprobs for event in await collect(plain))
        logprobs = [
            entry.logprob for event in await collect(wanting) for entry in event.delta.logprobs
        ]
        assert logprobs == [-3.0, -4.0, -5.0]

    run(model, script)


def test_resumed_ids_are_counted_and_not_sent_again(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        first, rest = encode("hello ")[:3], encode("world")
        request = text_request(seed=2)
        request.resume_output_ids.extend(first)
        call = served.stub.Generate(request)
        submit = await served.engine.next_submit()
        assert ids_of(submit.resume_output_ids) == first
        served.engine.send_outputs({submit.handle: rest})
        served.engine.end(submit.handle)
        events = await collect(call)
        assert [i for event in events for i in event.delta.token_ids] == rest
        assert events[-1].finished.usage.output_token_count == len(first) + len(rest)

    run(model, script)


def test_model_and_server_info(model: Path) -> None:
    async def script(served: Served) -> None:
        answer = await served.stub.GetModelInfo(generate_pb2.GetModelInfoRequest())
        assert (answer.model, answer.max_model_len) == (MODEL_NAME, MAX_MODEL_LEN)
        assert answer.vocab_size == VOCAB_SIZE
        assert list(answer.eos_token_ids) == [7]
        assert answer.has_tokenizer and answer.has_chat_template
        assert len(answer.model_digest) == 64
        server = await served.stub.GetServerInfo(generate_pb2.GetServerInfoRequest())
        assert server.epoch == 3

    run(model, script)


def test_many_streams_at_once_keep_their_ids_apart(model: Path, encode: Any) -> None:
    async def script(served: Served) -> None:
        calls = {}
        for index in range(32):
            request = text_request()
            request.request_id = f"r{index}"
            calls[index] = asyncio.create_task(all_events(served.stub.Generate(request)))
        handles = {}
        for _ in calls:
            submit = await served.engine.next_submit()
            handles[int(submit.request_id[1:])] = submit.handle
        texts = {index: f"stream {index} says {index * index}" for index in calls}
        outputs = {index: encode(text) for index, text in texts.items()}
        for position in range(max(map(len, outputs.values()))):
            served.engine.send_outputs(
                {handles[i]: ids[position : position + 1] for i, ids in outputs.items()}
            )
        for handle in handles.values():
            served.engine.end(handle)
        for index, task in calls.items():
            events = await within(task)
            assert "".join(event.delta.text for event in events) == texts[index]
            assert kinds(events).count("finished") == 1

    run(model, script)


def test_folder_without_tokenizer_takes_ids_and_refuses_text_and_chat(tmp_path: Path) -> None:
    async def script(served: Served) -> None:
        chat = generate_pb2.ChatPrompt(messages=[generate_pb2.ChatMessage(role="user")])
        for request in (text_request(), generate_pb2.GenerateRequest(chat=chat)):
            error = await failure(all_events(served.stub.Generate(request)))
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert "tokenizer" in str(error.details())
        ids = generate_pb2.TokenIds(ids=[1, 2])
        call = served.stub.Generate(generate_pb2.GenerateRequest(token_ids=ids))
        submit = await served.engine.next_submit()
        served.engine.send_outputs({submit.handle: [3, 4]})
        served.engine.end(submit.handle)
        events = await collect(call)
        assert [i for event in events for i in event.delta.token_ids] == [3, 4]
        assert served.engine.rejected == {"failed_precondition": 2}

    run(write_ids_only_model(tmp_path), script)
