"""Two workers driven by hand: what they refuse, and that they refuse it before any collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from lockstep.daemon.model_digest import model_digest
from lockstep.daemon.version import __version__
from protos.lockstep.v1 import worker_pb2, worker_pb2_grpc
from tests.helpers.tiny_models import write_tiny_model
from tests.helpers.worker_driver import StepStream, WorkerProcess, packed, start_group
from tests.integration.chaos_support import wait_until

_LIMIT_S = 60.0
_NUM_BLOCKS = 8
_PROMPT = (11, 12, 13)
_CONFIG = worker_pb2.EngineConfig(
    dtype="float32",
    block_size=4,
    max_num_seqs=4,
    max_batch_tokens=16,
    max_model_len=16,
    load_format="safetensors",
    comm="shm",
    kv_cache_bytes=1 << 20,
)


@dataclass
class Workers:
    """Two worker processes; every test gives them a new epoch."""

    model: Path
    oracle: Any
    addresses: list[str]
    epoch: int = 0
    stubs: list[Any] = field(default_factory=list)

    def new_epoch(self) -> list[StepStream]:
        """Takes them through all phases; one stream a rank."""
        self.epoch += 1
        self.stubs = start_group(self.model, self.addresses, _CONFIG, self.epoch, _NUM_BLOCKS)
        return [StepStream(stub, self.epoch) for stub in self.stubs]

    def collectives(self, rank: int) -> Any:
        request = worker_pb2.DumpFlightRecorderRequest()
        answer = self.stubs[rank].DumpFlightRecorder(request, timeout=_LIMIT_S)
        assert all(call.begun_nanos <= answer.now_nanos for call in answer.collectives)
        return answer.collectives

    def quiesce(self, rank: int) -> Any:
        request = worker_pb2.QuiesceRequest(epoch=self.epoch)
        return self.stubs[rank].Quiesce(request, timeout=_LIMIT_S)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    model = tmp_path_factory.mktemp("model")
    oracle = write_tiny_model(model)
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("workers")
        processes = [stack.enter_context(WorkerProcess(model, folder)) for _ in range(2)]
        yield Workers(model, oracle, [process.address() for process in processes])


@pytest.fixture
def streams(workers: Workers) -> Iterator[list[StepStream]]:
    streams = workers.new_epoch()
    yield streams
    for stream in streams:
        stream.close()


def prefill(**changes: Any) -> worker_pb2.TableDelta:
    """Opens slot 1 with block 1 for the prompt and runs all of it."""
    opening = worker_pb2.SlotOpen(
        slot=1,
        prompt_len=len(_PROMPT),
        prefill_len=len(_PROMPT),
        limit=4,
        block_ids=packed(1),
        top_p=1.0,
        repetition_penalty=1.0,
        logprob_count=-1,
    )
    delta = worker_pb2.TableDelta(
        opened_slots=[opening], chunks=packed(1, 0, 3), chunk_token_ids=packed(*_PROMPT)
    )
    for name, value in changes.items():
        where = opening if name in ("limit", "block_ids", "slot") else delta
        setattr(where, name, value)
    delta.opened_slots[0].CopyFrom(opening)
    return delta


def decode() -> worker_pb2.TableDelta:
    return worker_pb2.TableDelta(
        block_appends=packed(1, 1, 2), limits=packed(1, 5), row_changes=packed(0, 1), row_count=1
    )


def failure_of(stream: StepStream) -> worker_pb2.RankFailure:
    report = stream.report()
    assert report.WhichOneof("report") == "failure", report
    return report.failure


def test_a_prompt_and_a_step_give_the_tokens_of_transformers(
    workers: Workers, streams: list[StepStream]
) -> None:
    tokens = []
    for delta in (prefill(), decode()):
        for stream in streams:
            stream.send(delta)
        tokens += streams[0].tokens()
    with torch.inference_mode():
        logits = workers.oracle(torch.tensor([[*_PROMPT, tokens[0]]])).logits[0]
    assert tokens == logits[-2:].argmax(-1).tolist()
    # Rank 1 has no results to give; it tells how far it is.
    assert streams[1].report().progress.step >= 1


def test_a_prompt_runs_in_the_first_of_several_steps_and_the_rows_in_all(
    workers: Workers, streams: list[StepStream]
) -> None:
    for stream in streams:
        stream.send(prefill())
    row = streams[0].tokens()
    delta = decode()
    delta.limits = packed(1, 6)
    other = prefill(slot=2, block_ids=packed(3))
    delta.opened_slots.extend(other.opened_slots)
    delta.chunks, delta.chunk_token_ids = packed(2, 0, 3), other.chunk_token_ids
    for stream in streams:
        stream.send(delta, step_count=3)
    steps = [streams[0].tokens() for _ in range(3)]
    assert [len(tokens) for tokens in steps] == [2, 1, 1]
    assert steps[0][1] == row[0], "the same prompt"
    row += [tokens[0] for tokens in steps]
    with torch.inference_mode():
        logits = workers.oracle(torch.tensor([[*_PROMPT, *row[:-1]]])).logits[0]
    assert row == logits[-4:].argmax(-1).tolist()


def test_a_heartbeat_is_answered_by_every_rank(streams: list[StepStream]) -> None:
    for stream in streams:
        stream.send(worker_pb2.TableDelta(), step_count=0)
    for stream in streams:
        assert stream.report().progress.command_id == 1


def test_a_rank_that_hangs_in_a_collective_tells_which(
    workers: Workers, streams: list[StepStream]
) -> None:
    for stream in streams:
        stream.send(prefill())
    streams[0].tokens()
    assert all(call.ended_nanos for call in workers.collectives(1))
    streams[0].send(decode())  # to rank 0 alone, so that it waits for the other
    wait_until(
        lambda: not workers.collectives(0)[-1].ended_nanos, _LIMIT_S, lambda: "it never waits"
    )
    waiting, last = workers.collectives(0)[-1], workers.collectives(1)[-1]
    assert (waiting.operation, waiting.path) == ("all_reduce", "shm")
    assert waiting.byte_count > 0 and waiting.sequence > last.sequence
    assert workers.quiesce(0).is_drained


# How the second command differs from a good one, and words that the refusal must have.
FAULTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gap": ({"command_id": 3}, ["command 3", "after 1", "gap or repeat"]),
    "repeat": ({"command_id": 1}, ["command 1", "after 1", "gap or repeat"]),
    "foreign epoch": ({"epoch": 999}, ["epoch 999", "this is"]),
    "wrong step": ({"first_step": 5}, ["from 5", "next here is 2"]),
    "wrong digest": ({"digest": b"\xee" * 8}, ["digest eeeeeeeeeeeeeeee", "ours"]),
    "wrong table digest": ({"table_digest": b"\xee" * 8}, ["eeeeeeeeeeeeeeee", "ours"]),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_a_command_that_is_not_the_next_is_refused_naming_both_views(
    workers: Workers, streams: list[StepStream], fault: dict[str, Any], words: list[str]
) -> None:
    for stream in streams:
        stream.send(prefill())
    streams[0].tokens()
    # To rank 0 alone: had it entered a collective it would hang there, and could not answer.
    streams[0].send(decode(), **fault)
    failure = failure_of(streams[0])
    assert failure.is_refusal and failure.step == 0
    assert not [word for word in words if word not in failure.message], failure.message
    quiesced = workers.quiesce(0)
    assert quiesced.is_drained
    assert quiesced.last_step == 1
    assert quiesced.last_error == failure.message


# What is wrong with the first command's table changes, and words that the refusal must have.
OUT_OF_RANGE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "slot": ({"slot": 5}, ["slot 5", "1..4"]),
    "block": ({"block_ids": packed(8)}, ["block 8", "1..7"]),
    "dummy block": ({"block_ids": packed(0)}, ["block 0", "1..7"]),
    "limit": ({"limit": 9}, ["limit 9", "4"]),
    "token id": ({"chunk_token_ids": packed(11, 12, 301)}, ["token id", "0..300"]),
    "negative token id": ({"chunk_token_ids": packed(11, -1, 13)}, ["token id", "0..300"]),
    "chunk": ({"chunks": packed(1, 1, 3)}, ["slot 1", "1+3", "0"]),
    "chunk's ids": ({"chunk_token_ids": packed(11)}, ["3 token ids", "1 came"]),
    "row": ({"row_changes": packed(4, 1), "row_count": 1}, ["row 4", "0..3"]),
    "row count": ({"row_count": 2}, ["row_count is 2"]),
    "row in prefill": ({"row_changes": packed(0, 1), "row_count": 1}, ["slot 1", "prefill"]),
    "closed slot": ({"closed_slots": packed(2)}, ["slot 2", "not open"]),
    "odd bytes": ({"limits": b"\x00" * 5}, ["limits", "5 bytes", "8"]),
}


@pytest.mark.parametrize(("changes", "words"), OUT_OF_RANGE.values(), ids=OUT_OF_RANGE.keys())
def test_a_number_out_of_range_is_refused(
    workers: Workers, streams: list[StepStream], changes: dict[str, Any], words: list[str]
) -> None:
    streams[0].send(prefill(**changes))
    failure = failure_of(streams[0])
    assert failure.is_refusal and (failure.command_id, failure.step) == (1, 0)
    assert not [word for word in words if word not in failure.message], failure.message
    assert workers.quiesce(0).is_drained


def test_quiesce_frees_a_rank_whose_peer_refused(
    workers: Workers, streams: list[StepStream]
) -> None:
    streams[0].send(prefill())  # enters a collective that rank 1 never will
    streams[1].send(prefill(), command_id=2)
    assert failure_of(streams[1]).is_refusal
    quiesced = workers.quiesce(0)
    assert quiesced.is_drained and quiesced.last_step == 0
    assert "gap or repeat" in workers.quiesce(1).last_error


def test_a_stale_epoch_and_other_files_and_versions_are_refused(workers: Workers) -> None:
    workers.epoch += 1
    hello = worker_pb2.HelloRequest(
        version=__version__,
        model_digest=model_digest(workers.model),
        epoch=workers.epoch,
        world_size=1,
    )
    with grpc.insecure_channel(workers.addresses[0]) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        stub.Hello(hello, timeout=_LIMIT_S)
        refusals: list[tuple[dict[str, object], list[str]]] = [
            ({"epoch": workers.epoch - 1}, ["epoch", str(workers.epoch), "not above"]),
            ({"world_size": 2}, ["epoch", str(workers.epoch), "not above"]),
            ({"version": "9.9.9"}, ["9.9.9", __version__]),
            ({"model_digest": "f" * 64}, ["f" * 16, hello.model_digest[:16], "--model"]),
        ]
        for change, words in refusals:
            wrong = worker_pb2.HelloRequest()
            wrong.CopyFrom(hello)
            for name, value in change.items():
                setattr(wrong, name, value)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Hello(wrong, timeout=_LIMIT_S)
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert all(word in caught.value.details() for word in words)
        with pytest.raises(grpc.RpcError, match="weights are not loaded|in no group"):
            stub.Capture(worker_pb2.CaptureRequest(epoch=workers.epoch), timeout=_LIMIT_S)
