"""Every limit: the last value inside, the first outside, and what the refusal says."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from coordinator.errors import BadRequest, TextUnavailable
from coordinator.frontend.generation_defaults import GenerationDefaults
from coordinator.frontend.validation import (
    Constraint,
    ModelLimits,
    RequestFields,
    SamplingParams,
    check_prompt_length,
    check_scheduling,
    check_text,
    check_text_length,
    check_token_ids,
    random_seed,
    resolve_sampling,
)

_LIMITS = ModelLimits(vocab_size=100, max_model_len=64, longest_token_chars=10)
_DEFAULTS = GenerationDefaults(
    eos_token_ids=(2, 3), temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1
)


def _resolve(num_prompt_tokens: int = 10, num_resumed: int = 0, **fields: Any) -> SamplingParams:
    return resolve_sampling(
        RequestFields(**fields),
        _DEFAULTS,
        _LIMITS,
        num_prompt_tokens,
        num_resumed,
        draw_seed=lambda: 42,
    )


def test_what_a_request_leaves_out_comes_from_the_checkpoint_and_the_context() -> None:
    assert _resolve() == SamplingParams(
        temperature=0.6,
        top_p=0.9,
        top_k=20,
        min_p=0.1,
        seed=42,
        repetition_penalty=1.1,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        max_tokens=54,
        min_tokens=0,
        stop=(),
        stop_ids=(2, 3),
        ignore_eos=False,
        num_logprobs=None,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", 100.0),
        ("top_p", 1.0),
        ("top_p", 1e-9),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("min_p", 0.0),
        ("min_p", 1.0),
        ("seed", 0),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 100.0),
        ("presence_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("max_tokens", 1),
        ("max_tokens", 54),
        ("min_tokens", 54),
    ],
)
def test_value_at_the_limit_is_taken(field: str, value: float) -> None:
    fields: dict[str, Any] = {field: value}
    assert getattr(_resolve(**fields), field) == value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1e-9),
        ("temperature", 100.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 100.1),
        ("repetition_penalty", math.nan),
        ("presence_penalty", -2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -math.inf),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 55),
        ("min_tokens", -1),
        ("min_tokens", 55),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_value_outside_is_refused_naming_field_value_and_limit(field: str, value: float) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(BadRequest, match=re.escape(f"{field} is {value!r}; it must be ")):
        _resolve(**fields)


def test_max_tokens_beyond_the_context_says_how_it_is_made_up() -> None:
    with pytest.raises(BadRequest, match="max_model_len 64 less 10 prompt tokens"):
        _resolve(max_tokens=55)


def test_min_tokens_is_measured_by_the_requests_own_max_tokens() -> None:
    assert _resolve(max_tokens=5, min_tokens=5).min_tokens == 5
    with pytest.raises(BadRequest, match="max_tokens, which is 5"):
        _resolve(max_tokens=5, min_tokens=6)


def test_logprobs_zero_is_not_none() -> None:
    assert _resolve(logprobs=0).num_logprobs == 0
    assert _resolve(logprobs=20).num_logprobs == 20


def test_stop_ids_are_those_of_the_checkpoint_and_the_request_without_doubles() -> None:
    assert _resolve(stop_token_ids=[7, 2, 7]).stop_ids == (2, 3, 7)
    assert _resolve(stop_token_ids=[7, 2], ignore_eos=True).stop_ids == (7, 2)


def test_sixteen_stop_ids_in_all() -> None:
    assert len(_resolve(stop_token_ids=range(10, 24)).stop_ids) == 16
    with pytest.raises(BadRequest, match="17; it must be at most 16, of which 2 are end-of"):
        _resolve(stop_token_ids=range(10, 25))
    assert len(_resolve(stop_token_ids=range(10, 26), ignore_eos=True).stop_ids) == 16


def test_stop_id_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(BadRequest, match=r"stop_token_ids\[1\] is 100; .* 0 to 99"):
        _resolve(stop_token_ids=[5, 100])


def test_stop_strings_have_a_number_and_a_length() -> None:
    stops = [f"{index:>256}" for index in range(16)]
    assert _resolve(stop=stops).stop == tuple(stops)
    with pytest.raises(BadRequest, match="number of stop is 17"):
        _resolve(stop=[*stops, "a"])
    with pytest.raises(BadRequest, match=r"stop\[1\] is ''; it must be 1 to 256"):
        _resolve(stop=["a", ""])
    with pytest.raises(BadRequest, match=r"stop\[0\] is .*257 long"):
        _resolve(stop=["a" * 257])


def test_text_limits_need_a_tokenizer() -> None:
    ids_only = dataclasses.replace(_LIMITS, longest_token_chars=None)
    for name, fields in (
        ("stop", RequestFields(stop=["a"])),
        ("bad_words", RequestFields(bad_words=["a"])),
        ("regex", RequestFields(constraint=Constraint("regex", "a"))),
    ):
        with pytest.raises(TextUnavailable, match=f"^{name} needs a tokenizer"):
            resolve_sampling(fields, _DEFAULTS, ids_only, 1)
    with pytest.raises(TextUnavailable, match="^text needs a tokenizer"):
        check_text("text", "hello", ids_only)


@pytest.mark.parametrize("num_prompt_tokens", [0, 64, 65])
def test_prompt_is_not_empty_and_leaves_room_for_a_token(num_prompt_tokens: int) -> None:
    with pytest.raises(BadRequest, match="tokens in prompt is .* at least 1 and at most 63"):
        check_prompt_length(num_prompt_tokens, _LIMITS)
    with pytest.raises(BadRequest):
        _resolve(num_prompt_tokens)


def test_prompt_that_just_fits_gets_one_token() -> None:
    assert _resolve(63).max_tokens == 1


def test_resumed_output_may_be_whole_and_not_longer() -> None:
    assert _resolve(num_resumed=5, max_tokens=5).max_tokens == 5
    with pytest.raises(BadRequest, match="resume_output_ids is 6; .* max_tokens, which is 5"):
        _resolve(num_resumed=6, max_tokens=5)


def test_ten_megabytes_of_text_are_refused_by_their_length() -> None:
    with pytest.raises(BadRequest, match="length of text is 10485760; .* 640 characters: 64 tok"):
        check_text("text", "x" * (10 << 20), _LIMITS)


def test_text_that_could_just_fit_is_taken() -> None:
    check_text("text", "x" * 640, _LIMITS)
    check_text_length("messages", 640, _LIMITS)
    with pytest.raises(BadRequest, match="length of messages is 641"):
        check_text_length("messages", 641, _LIMITS)


def test_text_that_is_empty_or_no_unicode_is_refused() -> None:
    with pytest.raises(BadRequest, match="text is ''; it must be not empty"):
        check_text("text", "", _LIMITS)
    with pytest.raises(BadRequest, match="lone surrogates"):
        check_text("text", "a\ud800", _LIMITS)


def test_token_ids_come_back_packed() -> None:
    for given in ([0, 99], (0, 99), np.array([0, 99])):
        ids = check_token_ids("token_ids", given, _LIMITS)
        assert ids.dtype == np.int32
        assert ids.tolist() == [0, 99]
    assert check_token_ids("token_ids", [], _LIMITS).size == 0


@pytest.mark.parametrize(("ids", "index", "value"), [([1, -1], 1, -1), ([100, 200], 0, 100)])
def test_first_token_id_out_of_range_is_named(ids: list[int], index: int, value: int) -> None:
    with pytest.raises(BadRequest, match=rf"token_ids\[{index}\] is {value}; .* 0 to 99"):
        check_token_ids("token_ids", ids, _LIMITS)


def test_random_seeds_differ_and_fit_a_signed_64_bit_integer() -> None:
    seeds = {random_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("n", [1, 16])
def test_samples_up_to_the_limit(n: int) -> None:
    assert _resolve(n=n).num_samples == n


@pytest.mark.parametrize("n", [0, -1, 17])
def test_samples_outside_are_refused(n: int) -> None:
    with pytest.raises(BadRequest, match=f"n is {n}; it must be at least 1 and at most 16"):
        _resolve(n=n)


def test_resumed_output_is_of_one_sample() -> None:
    assert _resolve(num_resumed=2, n=1).num_samples == 1
    with pytest.raises(BadRequest, match="n is 2; it must be 1 with resume_output_ids"):
        _resolve(num_resumed=2, n=2)


def test_seeds_of_samples_count_up_and_wrap_to_int64() -> None:
    assert [_resolve(seed=-1).sample_seed(index) for index in range(3)] == [-1, 0, 1]
    last = _resolve(seed=2**63 - 1, n=2)
    assert [last.sample_seed(index) for index in range(2)] == [2**63 - 1, -(2**63)]


def test_priority_and_tenant_at_their_limits() -> None:
    for priority in (-100, 100):
        check_scheduling(priority, "t" * 64)
    with pytest.raises(BadRequest, match="priority is 101; .* at most 100"):
        check_scheduling(101, "")
    with pytest.raises(BadRequest, match="priority is -101; .* at least -100"):
        check_scheduling(-101, "")
    with pytest.raises(BadRequest, match="tenant is 't.*; it must be at most 64 characters long"):
        check_scheduling(0, "t" * 65)
