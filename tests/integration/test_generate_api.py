"""Everything a client can ask of Generate, against a real model on two ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lockstep.daemon.version import __version__
from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import Client, chat_request, ids_request, text_request
from tests.helpers.served_group import ServedGroup

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_LIMIT_S = 100.0
_PROMPT = "The capital of France is"
_GREEDY: Mapping[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class Answer:
    """A drained stream."""

    def __init__(self, client: Client, request: generate_pb2.GenerateRequest) -> None:
        generation = client.generate(request, timeout_s=_LIMIT_S)
        deltas = list(generation)
        assert generation.started is not None and generation.finished is not None
        self.started, self.finished = generation.started, generation.finished
        self.text = "".join(delta.text for delta in deltas)
        self.ids = [token for delta in deltas for token in delta.token_ids]
        self.logprobs = [entry for delta in deltas for entry in delta.logprobs]


@pytest.fixture(scope="module")
def client(smollm2_tp2: ServedGroup) -> Iterator[Client]:
    with smollm2_tp2.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def greedy(client: Client) -> Answer:
    return Answer(client, text_request(_PROMPT, max_tokens=16, logprobs=5, **_GREEDY))


def test_deltas_concatenate_to_the_decode_of_all_ids(
    client: Client, tokenizer: Any, greedy: Answer
) -> None:
    assert greedy.text == tokenizer.decode(greedy.ids)
    wild = Answer(client, text_request(_PROMPT, temperature=8.0, seed=3, max_tokens=24))
    assert wild.text == tokenizer.decode(wild.ids, skip_special_tokens=True)


def test_unary_equals_stream(client: Client, greedy: Answer) -> None:
    request = text_request(_PROMPT, max_tokens=16, logprobs=5, **_GREEDY)
    unary = client.generate_unary(request, timeout_s=_LIMIT_S)
    assert list(unary.output.token_ids) == greedy.ids
    assert unary.output.text == greedy.text
    assert len(unary.output.logprobs) == 16
    assert unary.finished == greedy.finished


def test_text_and_its_token_ids_are_the_same_prompt(
    client: Client, tokenizer: Any, greedy: Answer
) -> None:
    ids = tokenizer(_PROMPT)["input_ids"]
    answer = Answer(client, ids_request(ids, max_tokens=16, **_GREEDY))
    assert (answer.ids, answer.text) == (greedy.ids, greedy.text)
    assert answer.started.prompt_token_count == len(ids)


def test_chat_is_rendered_as_transformers_does(client: Client, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Name a colour. <|im_end|>"}]
    answer = Answer(client, chat_request([{"role": "user", "content": "Hi"}], max_tokens=1))
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=False
    )
    assert answer.started.prompt_token_count == len(rendered)
    # A control token in what the user says stays text: more tokens than its one id.
    answer = Answer(client, chat_request(turns, max_tokens=1))
    as_control = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert answer.started.prompt_token_count > len(as_control)


def test_usage_and_finish_reason_at_max_tokens(greedy: Answer, tokenizer: Any) -> None:
    assert greedy.finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    assert greedy.finished.usage.output_token_count == len(greedy.ids) == 16
    assert greedy.finished.usage.prompt_token_count == len(tokenizer(_PROMPT)["input_ids"])


def test_a_seed_repeats_and_another_differs(client: Client) -> None:
    def sampled(**params: Any) -> Answer:
        return Answer(client, text_request(_PROMPT, temperature=1.5, max_tokens=12, **params))

    first = sampled(seed=11)
    assert first.started.seed == 11
    assert sampled(seed=11).ids == first.ids
    assert sampled(seed=12).ids != first.ids
    drawn = sampled()
    assert sampled(seed=drawn.started.seed).ids == drawn.ids


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1, "temperature": 2.0},
        {"top_p": 1e-5, "temperature": 2.0},
        {"min_p": 1.0, "temperature": 2.0},
    ],
    ids=lambda params: next(iter(params)),
)
def test_a_filter_that_leaves_one_token_is_greedy(
    client: Client, greedy: Answer, params: dict[str, Any]
) -> None:
    answer = Answer(client, text_request(_PROMPT, max_tokens=16, seed=1, ignore_eos=True, **params))
    assert answer.ids == greedy.ids


@pytest.mark.parametrize(
    "params",
    [{"repetition_penalty": 100.0}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}],
    ids=lambda params: next(iter(params)),
)
def test_penalties_change_a_greedy_output(client: Client, params: dict[str, Any]) -> None:
    prompt = "one one one one one one one one"
    plain = Answer(client, text_request(prompt, max_tokens=16, **_GREEDY))
    assert len(set(plain.ids)) < 8
    answer = Answer(client, text_request(prompt, max_tokens=16, **_GREEDY, **params))
    assert len(set(answer.ids)) > len(set(plain.ids))


def test_stop_string_across_tokens_ends_before_it(
    client: Client, tokenizer: Any, greedy: Answer
) -> None:
    split = len(tokenizer.decode(greedy.ids[:4]))
    stop = greedy.text[split - 2 : split + 2]
    assert greedy.text.index(stop) == split - 2
    answer = Answer(client, text_request(_PROMPT, max_tokens=16, stop=[stop], **_GREEDY))
    assert answer.text == greedy.text[: split - 2]
    assert answer.finished.finish_reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.stop == stop
    assert answer.finished.usage.output_token_count == len(answer.ids) <= 4


def test_stop_id_is_the_last_output_id(client: Client, greedy: Answer) -> None:
    wanted = greedy.ids[5]
    first = greedy.ids.index(wanted)
    answer = Answer(
        client, text_request(_PROMPT, max_tokens=16, stop_token_ids=[wanted], **_GREEDY)
    )
    assert answer.ids == greedy.ids[: first + 1]
    assert answer.finished.finish_reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.stop_token_id == wanted


def test_min_tokens_keeps_stop_ids_away(client: Client, greedy: Answer) -> None:
    wanted = greedy.ids[0]
    request = text_request(_PROMPT, max_tokens=16, min_tokens=6, stop_token_ids=[wanted], **_GREEDY)
    answer = Answer(client, request)
    assert len(answer.ids) >= 6
    assert wanted not in answer.ids[:6]


def test_end_of_sequence_stops_unless_ignored(client: Client) -> None:
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    stopped = Answer(client, chat_request(turns, temperature=0.0, max_tokens=24))
    assert stopped.finished.stop_token_id == 2
    assert stopped.ids[-1] == 2
    ignored = Answer(client, chat_request(turns, max_tokens=24, **_GREEDY))
    assert len(ignored.ids) == 24
    assert ignored.ids[: len(stopped.ids)] == stopped.ids


def test_logprobs_are_those_of_transformers(
    smollm2_dir: Path, tokenizer: Any, greedy: Answer
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    prompt = tokenizer(_PROMPT)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *greedy.ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(greedy.logprobs) == len(greedy.ids)
    for row, (token, entry) in enumerate(zip(greedy.ids, greedy.logprobs, strict=True)):
        assert entry.logprob == pytest.approx(expected[row, token].item(), abs=2e-3)
        best = expected[row].topk(5)
        assert list(entry.top_logprobs) == pytest.approx(best.values.tolist(), abs=2e-3)
        assert entry.top_token_ids[0] == token
        assert set(entry.top_token_ids) == set(best.indices.tolist())


@pytest.mark.parametrize("params", [_GREEDY, {"temperature": 1.2, "frequency_penalty": 0.5}])
def test_resumed_output_goes_on_identically(client: Client, params: dict[str, Any]) -> None:
    whole = Answer(client, text_request(_PROMPT, max_tokens=12, seed=5, **params))
    request = text_request(_PROMPT, max_tokens=12, seed=5, **params)
    request.resume_output_ids.extend(whole.ids[:5])
    resumed = Answer(client, request)
    assert resumed.ids == whole.ids[5:]
    assert whole.text.endswith(resumed.text)
    assert resumed.finished == whole.finished


def test_model_info_says_what_the_model_takes(client: Client) -> None:
    model = client.model_info()
    assert (model.max_model_len, model.vocab_size) == (1024, 49152)
    assert list(model.eos_token_ids) == [2]
    assert model.has_tokenizer and model.has_chat_template
    assert len(model.model_digest) == 64


def test_server_info_names_ranks_and_their_shares(
    client: Client, smollm2_tp2: ServedGroup, greedy: Answer
) -> None:
    info = client.server_info()
    assert info.version == __version__
    assert info.is_ready and info.epoch >= 1
    assert (info.block_size, info.max_num_seqs) == (16, 256)
    assert info.block_count > 64
    assert [rank.rank for rank in info.ranks] == [0, 1]
    assert [rank.local_q_head_count for rank in info.ranks] == [6, 3]
    assert [rank.local_kv_head_count for rank in info.ranks] == [2, 1]
    assert {rank.pid for rank in info.ranks} <= {p.pid for p in smollm2_tp2.members()}
    for rank in info.ranks:
        assert rank.is_up and rank.device == "cpu"
        assert rank.parameter_count > 0 and rank.bytes_read > 0 and rank.all_reduce_count > 0


def test_samples_are_the_calls_that_their_seeds_alone_would_give(client: Client) -> None:
    params: dict[str, Any] = {"temperature": 1.2, "max_tokens": 8, "ignore_eos": True}
    unary = client.generate_unary(text_request(_PROMPT, n=3, seed=40, **params), _LIMIT_S)
    first = generate_pb2.Sample(output=unary.output, finished=unary.finished)
    samples = [first, *unary.further_samples]
    for index, sample in enumerate(samples):
        alone = Answer(client, text_request(_PROMPT, seed=40 + index, **params))
        assert list(sample.output.token_ids) == alone.ids
        assert sample.output.text == alone.text
        assert sample.finished.sample_index == index
        assert sample.finished.usage.output_token_count == 8
    assert unary.started.seed == 40


def test_stream_of_samples_is_the_unary_answer(client: Client) -> None:
    request = text_request(_PROMPT, n=2, seed=7, temperature=1.0, max_tokens=8)
    unary = client.generate_unary(request, _LIMIT_S)
    generation = client.generate(request, _LIMIT_S)
    ids: dict[int, list[int]] = {0: [], 1: []}
    for delta in generation:
        ids[delta.sample_index] += delta.token_ids
    assert ids[0] == list(unary.output.token_ids)
    assert ids[1] == list(unary.further_samples[0].output.token_ids)
    assert sorted(generation.finished_samples) == [0, 1]


@pytest.mark.parametrize("params", [{}, {"stop": [" "]}], ids=["length", "stop text"])
def test_trailing_metadata_say_where_the_time_went(client: Client, params: dict[str, Any]) -> None:
    generation = client.generate(
        text_request(_PROMPT, max_tokens=16, **_GREEDY, **params), _LIMIT_S
    )
    assert list(generation) or params
    times = generation.times
    for key in ("frontend", "queue", "prefill", "decode"):
        assert float(times[f"lockstep-{key}-ms"]) >= 0
    assert int(times["lockstep-steps"]) >= 1
    assert int(times["lockstep-preemptions"]) == 0
    assert int(times["lockstep-epoch"]) == client.server_info().epoch
    assert int(times["lockstep-cached-tokens"]) >= 0


def test_scheduling_fields_change_no_token(client: Client, greedy: Answer) -> None:
    request = text_request(_PROMPT, max_tokens=16, logprobs=5, **_GREEDY)
    request.priority, request.tenant, request.use_prefix_cache = 5, "acme", False
    assert Answer(client, request).ids == greedy.ids
