"""Constrained outputs on two ranks: under load, preempted, sampled, resumed and replayed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from coordinator.frontend.tokenizer import Tokenizer
from lockstep.client import ids_request
from lockstep.daemon.exit_codes import ExitCode
from protos.lockstep.v1 import generate_pb2
from tests.helpers.served_group import ServedGroup, value_of
from tests.helpers.tiny_models import write_tiny_model
from tests.integration.conftest import CPU_FLAGS
from tests.integration.test_batching import Stream, with_stub
from tests.integration.test_replay import run_replay
from tests.unit.coordinator.frontend.small_tokenizers import byte_level, write_checkpoint

pytestmark = pytest.mark.timeout(240)
_EOS = 269
_NUM_REQUESTS = 24
# 48 blocks of 16 tokens for 24 requests of up to 160: some are preempted.
_FLAGS = ("--tp", "2", "--max-model-len", "256", "--kv-cache-bytes", "196K", *CPU_FLAGS)
_STEP_FLAGS = ("--max-num-seqs", "16", "--max-batch-tokens", "48")
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z ]{0,12}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def _is_person(text: str) -> bool:
    person = json.loads(text)
    is_whole = set(person) == {"name", "age"} and isinstance(person["age"], int)
    return is_whole and re.fullmatch("[a-z ]{0,12}", person["name"]) is not None


# Parameters and what whole outputs must be.
_KINDS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"ignore_eos": True}, lambda text: True),
    ({"json_schema": json.dumps(_SCHEMA)}, _is_person),
    ({"regex": "[a-z]{20,60}"}, lambda text: re.fullmatch("[a-z]{20,60}", text) is not None),
    (
        {"choice": generate_pb2.ChoiceConstraint(choices=["hello user", "日本", "a" * 40])},
        lambda text: text in ("hello user", "日本", "a" * 40),
    ),
]


def request(index: int, kind: int, **changes: Any) -> generate_pb2.GenerateRequest:
    """Every other one samples, with a penalty."""
    draw = np.random.default_rng(index)
    prompt = draw.integers(3, 256, draw.integers(3, 90)).tolist()
    sampling: dict[str, Any] = {"temperature": 0.0}
    if index % 2:
        sampling = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.3}
    params = {"max_tokens": 90, "seed": index, **sampling, **_KINDS[kind][0], **changes}
    return ids_request(prompt, **params)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, max_position_embeddings=4096, eos_token_id=_EOS)
    write_checkpoint(folder, byte_level())
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {_EOS}}}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_dir(model)


@pytest.fixture(scope="module")
def group(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    folder = tmp_path_factory.mktemp("constraints")
    with ServedGroup(model, folder, *_FLAGS, *_STEP_FLAGS) as group:
        yield group


@pytest.fixture(scope="module")
def log_and_streams(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Stream]]:
    """What a group logged under load, with preemptions of constrained requests."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "steps"
    streams: list[Stream] = []

    async def load(stub: Any) -> None:
        requests = [request(index, index % len(_KINDS)) for index in range(_NUM_REQUESTS)]
        streams.extend(Stream(stub, one) for one in requests)
        for stream in streams:
            await stream.ended

    flags = (*_FLAGS, *_STEP_FLAGS, "--step-log", str(path), "--step-log-bytes", "4M")
    with ServedGroup(model, folder / "group", *flags) as group:
        with_stub(group, load)
        assert value_of(group.metrics, "lockstep_preemptions_total") > 0
        assert value_of(group.metrics, "lockstep_step_log_dropped_total") == 0
    return path, streams


def test_under_load_every_whole_output_is_what_was_asked_for(
    log_and_streams: tuple[Path, list[Stream]], tokenizer: Tokenizer
) -> None:
    num_whole = 0
    for index, stream in enumerate(log_and_streams[1]):
        assert stream.status is grpc.StatusCode.OK
        is_whole = stream.reason == generate_pb2.FINISH_REASON_STOP
        kind = index % len(_KINDS)
        assert is_whole == (stream.ids[-1] == _EOS) and is_whole <= (kind > 0)
        text = tokenizer.decode(stream.ids)
        assert not is_whole or _KINDS[kind][1](text), text
        num_whole += is_whole
    assert num_whole > _NUM_REQUESTS // 2


def test_a_log_with_masks_replays_with_identical_tokens(
    log_and_streams: tuple[Path, list[Stream]], model: Path, tmp_path: Path
) -> None:
    words = ("--tp", "2", "--model", str(model), "--devices", "cpu", "--num-threads", "1")
    code, record, output = run_replay(tmp_path, str(log_and_streams[0]), *words)
    assert code == ExitCode.CLEAN, output
    assert record["different_tokens"] == 0 and record["steps_compared"] > 60


@pytest.mark.parametrize("kind", [1, 2])
def test_samples_differ_and_the_same_seed_repeats_them(
    group: ServedGroup, tokenizer: Tokenizer, kind: int
) -> None:
    with group.client() as client:
        asked = request(1, kind, n=4)
        answers = [client.generate_unary(asked) for _ in range(2)]
    texts = []
    for answer in answers:
        further = answer.further_samples
        ends = [answer.finished, *(sample.finished for sample in further)]
        assert all(end.finish_reason == generate_pb2.FINISH_REASON_STOP for end in ends)
        texts.append([answer.output.text, *(sample.output.text for sample in further)])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert all(_KINDS[kind][1](text) for text in texts[0])


def test_a_broken_call_goes_on_inside_its_constraint(group: ServedGroup) -> None:
    with group.client() as client:
        whole = list(client.generate_unary(request(3, 1)).output.token_ids)
        for num_had in (1, len(whole) // 2, len(whole) - 1, len(whole)):
            resumed = request(3, 1)
            resumed.resume_output_ids.extend(whole[:num_had])
            rest = client.generate_unary(resumed)
            assert list(rest.output.token_ids) == whole[num_had:]
            assert rest.finished.finish_reason == generate_pb2.FINISH_REASON_STOP


def test_what_cannot_be_compiled_is_refused_and_harms_no_other(group: ServedGroup) -> None:
    async def script(stub: Any) -> None:
        other = Stream(stub, request(2, 2))
        for params, words in (
            ({"regex": "a(b"}, "unclosed group"),
            ({"json_schema": "{"}, "not JSON"),
            ({"lark_grammar": "start: foo"}, "foo"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.Generate(request(4, 0, ignore_eos=False, **params)):
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert words in str(caught.value.details())
        await other.ended
        assert other.reason == generate_pb2.FINISH_REASON_STOP

    with_stub(group, script)
    assert value_of(group.metrics, "lockstep_num_requests_running") == 0


def test_biases_bad_words_and_kept_stop_texts_reach_the_model(
    group: ServedGroup, tokenizer: Tokenizer
) -> None:
    [a, b] = tokenizer.encode("ab")
    with group.client() as client:
        favoured = client.generate_unary(request(0, 0, logit_bias={a: 100.0}, max_tokens=5))
        assert list(favoured.output.token_ids) == [a] * 5
        params: dict[str, Any] = {"logit_bias": {a: 100.0, b: 90.0}, "bad_words": ["aaa"]}
        kept = client.generate_unary(
            request(0, 0, stop=["ba"], include_stop=True, max_tokens=9, **params)
        )
        without = client.generate_unary(request(0, 0, max_tokens=9, **params))
    assert without.output.text == "aabaabaab"
    assert kept.output.text == "aaba" and kept.finished.stop == "ba"
