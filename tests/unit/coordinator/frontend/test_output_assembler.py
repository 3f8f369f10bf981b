"""Ids and text leave together, and nothing leaves past a stop."""

import functools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import TextUnavailable
from coordinator.frontend.output_assembler import Delta, OutputAssembler
from coordinator.frontend.text_stream import byte_level_alphabet
from coordinator.frontend.tokenizer import Tokenizer
from tests.unit.coordinator.frontend.small_tokenizers import STREAMING_KINDS

_KINDS = ("byte_level", "byte_fallback", "metaspace_first")


@functools.cache
def _tokenizer(kind: str = "byte_level") -> Tokenizer:
    return Tokenizer(STREAMING_KINDS[kind](), {})


def _ids(text: str) -> list[int]:
    return _tokenizer().encode(text, add_special_tokens=False)


def _byte_ids(text: str) -> list[int]:
    """One byte-level token per byte."""
    chars = {byte: char for char, byte in byte_level_alphabet().items()}
    by_token = {_tokenizer().token(token_id): token_id for token_id in range(256)}
    return [by_token[chars[byte]] for byte in text.encode()]


def _run(assembler: OutputAssembler, batches: Sequence[Sequence[int]]) -> list[Delta]:
    deltas = []
    for index, ids in enumerate(batches):
        deltas.append(assembler.push(ids, index == len(batches) - 1))
        if assembler.matched_stop is not None:
            break
    return deltas


def _text(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _all_ids(deltas: Sequence[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def _draw_batches(data: st.DataObject, kind: str) -> list[list[int]]:
    any_id = st.integers(0, _tokenizer(kind).vocab_size - 1)
    return data.draw(st.lists(st.lists(any_id, max_size=4), min_size=1, max_size=10))


_STOPS = st.lists(st.text("he wlus", min_size=1, max_size=3), max_size=2)


@pytest.mark.parametrize("kind", _KINDS)
@given(data=st.data())
@settings(max_examples=60)
def test_ids_that_pass_at_once_give_what_a_look_at_each_gives(
    kind: str, data: st.DataObject
) -> None:
    batches = _draw_batches(data, kind)
    resumed = data.draw(st.sampled_from([[], batches[0]]))
    stop_ids = data.draw(st.sampled_from([(), batches[0][:1]]))
    usual, careful = (
        OutputAssembler(_tokenizer(kind), stop_ids=stop_ids, resume_output_ids=resumed)
        for _ in range(2)
    )
    careful._settled_text = lambda ids: None  # type: ignore[method-assign]
    assert _run(usual, batches) == _run(careful, batches)
    assert usual.num_output_tokens == careful.num_output_tokens


@pytest.mark.parametrize("kind", _KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_deltas_join_to_all_ids_and_all_text(kind: str, data: st.DataObject) -> None:
    batches = _draw_batches(data, kind)
    assembler = OutputAssembler(_tokenizer(kind))
    deltas = _run(assembler, batches)
    ids = [token_id for batch in batches for token_id in batch]
    assert _all_ids(deltas) == ids
    assert _text(deltas) == _tokenizer(kind).decode(ids)
    assert assembler.num_output_tokens == len(ids)


@pytest.mark.parametrize("kind", _KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_released_text_is_always_the_text_of_the_released_ids(
    kind: str, data: st.DataObject
) -> None:
    batches = _draw_batches(data, kind)
    assembler = OutputAssembler(_tokenizer(kind), stops=data.draw(_STOPS))
    text = ""
    ids: list[int] = []
    for batch in batches:
        delta = assembler.push(batch, False)
        text += delta.text
        ids += delta.token_ids
        if assembler.matched_stop is not None:
            return
        assert text == _tokenizer(kind).decode(ids)
        assert assembler.num_output_tokens == len(ids)


@pytest.mark.parametrize("kind", _KINDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_resuming_after_any_delta_gives_the_rest_exactly(kind: str, data: st.DataObject) -> None:
    batches = _draw_batches(data, kind)
    stops = data.draw(_STOPS)
    min_tokens = data.draw(st.integers(0, 5))
    include_stop = data.draw(st.booleans())
    whole = OutputAssembler(
        _tokenizer(kind), stops=stops, min_tokens=min_tokens, include_stop=include_stop
    )
    deltas = _run(whole, batches)
    # The connection breaks after some delta; what was generated after its ids is generated again.
    broken_after = data.draw(st.integers(0, len(deltas) - 1))
    received = deltas[:broken_after]
    ids = _all_ids(received)
    again = [token_id for batch in batches for token_id in batch][len(ids) :]
    resumed = OutputAssembler(
        _tokenizer(kind),
        stops=stops,
        min_tokens=min_tokens,
        include_stop=include_stop,
        resume_output_ids=ids,
    )
    assert resumed.matched_stop is None
    rest = _run(resumed, [[token_id] for token_id in again] + [[]])
    assert _text(received) + _text(rest) == _text(deltas)
    assert ids + _all_ids(rest) == _all_ids(deltas)
    assert resumed.matched_stop == whole.matched_stop
    assert resumed.num_output_tokens == whole.num_output_tokens


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_result_does_not_depend_on_how_ids_are_batched(data: st.DataObject) -> None:
    batches = _draw_batches(data, "byte_level")
    stops = data.draw(_STOPS)
    ids = [token_id for batch in batches for token_id in batch]
    outcomes = []
    for cut in (batches, [[token_id] for token_id in ids] + [[]], [ids]):
        assembler = OutputAssembler(_tokenizer(), stops=stops)
        deltas = _run(assembler, cut)
        outcomes.append((_text(deltas), _all_ids(deltas), assembler.matched_stop))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_ids_wait_for_the_character_they_complete() -> None:
    assembler = OutputAssembler(_tokenizer())
    first, second, third = _byte_ids("世")
    assert assembler.push([first], False) == Delta("", ())
    assert assembler.push([second], False) == Delta("", ())
    assert assembler.push([third], False) == Delta("世", (first, second, third))


def test_text_that_could_begin_a_stop_is_held_with_its_ids() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["END"])
    a, e, n, x = _byte_ids("aENx")
    assert assembler.push([a, e, n], False) == Delta("a", (a,))
    assert assembler.num_output_tokens == 1
    assert assembler.push([x], False) == Delta("ENx", (e, n, x))


def test_nothing_past_a_stop_is_released_or_counted() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["END"])
    ids = _byte_ids("abENDcd")
    assert assembler.push(ids, False) == Delta("ab", tuple(ids[:2]))
    assert assembler.matched_stop == "END"
    assert assembler.num_output_tokens == 2
    assert assembler.push(_ids("more"), True) == Delta("", ())
    assert assembler.num_output_tokens == 2


def test_stop_inside_a_token_ends_the_text_there_and_leaves_the_token_out() -> None:
    (hell,) = _ids("hell")
    assembler = OutputAssembler(_tokenizer(), stops=["l"])
    assert assembler.push([hell], False) == Delta("he", ())
    assert assembler.num_output_tokens == 0


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_included_stop_adds_its_text_and_nothing_else(data: st.DataObject) -> None:
    batches, stops = _draw_batches(data, "byte_level"), data.draw(_STOPS)
    without = OutputAssembler(_tokenizer(), stops=stops)
    included = OutputAssembler(_tokenizer(), stops=stops, include_stop=True)
    text, longer = _text(_run(without, batches)), _text(_run(included, batches))
    assert included.matched_stop == without.matched_stop
    assert longer == text + (without.matched_stop or "")


def test_included_stop_is_counted_with_the_tokens_it_takes() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["END"], include_stop=True)
    assert assembler.push(_byte_ids("xEN"), False).text == "x"
    assert assembler.push(_byte_ids("Dy"), False) == Delta("END", tuple(_byte_ids("END")))
    assert assembler.num_output_tokens == 4


def test_held_text_comes_out_at_the_end() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["END"])
    ids = _byte_ids("aEN")
    assembler.push(ids, False)
    assert assembler.push([], True) == Delta("EN", tuple(ids[1:]))


def test_unfinished_character_at_the_end_is_replaced_and_its_ids_come() -> None:
    ids = _byte_ids("世")[:2]
    assert OutputAssembler(_tokenizer()).push(ids, True) == Delta("\ufffd", tuple(ids))


def test_stop_completed_by_the_last_replacement_character_counts() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["\ufffd"])
    ids = _byte_ids("a世")[:2]
    assert assembler.push(ids, True) == Delta("a", tuple(ids[:1]))
    assert assembler.matched_stop == "\ufffd"


def test_stop_id_counts_but_adds_no_text() -> None:
    (stop_id,) = _ids("hell")
    ids = [*_ids("use"), stop_id]
    assembler = OutputAssembler(_tokenizer(), stop_ids=[stop_id], stops=["hell"])
    assert assembler.push(ids, True) == Delta("use", tuple(ids))
    assert assembler.matched_stop is None


def test_special_tokens_travel_without_text() -> None:
    (end,) = _ids("<|im_end|>")
    assembler = OutputAssembler(_tokenizer())
    assert assembler.push([*_ids("he"), end], True) == Delta("he", (*_ids("he"), end))


def test_stop_in_the_first_min_tokens_does_not_count() -> None:
    ids = _byte_ids("xyxy")
    assembler = OutputAssembler(_tokenizer(), stops=["y"], min_tokens=2)
    assert assembler.push(ids, False) == Delta("xyx", tuple(ids[:3]))
    assert assembler.matched_stop == "y"


def test_stop_already_in_resumed_ids_is_found_at_once() -> None:
    assembler = OutputAssembler(_tokenizer(), stops=["y"], resume_output_ids=_byte_ids("xyz"))
    assert assembler.matched_stop == "y"
    assert assembler.push(_byte_ids("a"), True) == Delta("", ())


def test_stop_that_began_in_resumed_text_takes_nothing_back() -> None:
    ids = _byte_ids("aEND")
    assembler = OutputAssembler(_tokenizer(), stops=["END"], resume_output_ids=ids[:3])
    assert assembler.push(ids[3:], False) == Delta("", ())
    assert assembler.matched_stop == "END"
    assert assembler.num_output_tokens == 3


def test_character_begun_in_resumed_ids_comes_with_the_id_that_completes_it() -> None:
    first, second, third = _byte_ids("世")
    assembler = OutputAssembler(_tokenizer(), resume_output_ids=[first, second])
    assert assembler.push([third], False) == Delta("世", (third,))
    assert assembler.num_output_tokens == 3


def test_without_a_tokenizer_ids_pass_through() -> None:
    assembler = OutputAssembler(None, stop_ids=[2], resume_output_ids=[7])
    assert assembler.push([5, 6], False) == Delta("", (5, 6))
    assert assembler.push([2], True) == Delta("", (2,))
    assert assembler.num_output_tokens == 4


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(TextUnavailable, match="stop strings"):
        OutputAssembler(None, stops=["a"])


def test_push_after_the_end_is_a_bug_of_the_caller() -> None:
    assembler = OutputAssembler(None)
    assembler.push([], True)
    with pytest.raises(AssertionError, match="after finished"):
        assembler.push([1], False)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_ids_through_stop_are_those_up_to_the_one_that_completes_it(size: int) -> None:
    ids = _byte_ids("one two three")
    batches = [ids[start : start + size] for start in range(0, len(ids), size)]
    through = OutputAssembler(_tokenizer(), stops=["o t"], ids_through_stop=True)
    deltas = _run(through, batches)
    assert through.matched_stop == "o t"
    assert _all_ids(deltas) == ids[: len("one two t")]
    assert through.num_output_tokens == len("one two t")
    before = OutputAssembler(_tokenizer(), stops=["o t"])
    assert _all_ids(_run(before, batches)) == ids[: len("one tw")]
    assert _text(deltas) == "one tw"


def test_ids_through_stop_end_with_a_token_that_goes_on_behind_it() -> None:
    ids = _ids("hello world")
    inside = next(
        _tokenizer().token_bytes(token_id).decode()
        for token_id in ids
        if len(_tokenizer().token_bytes(token_id)) > 2
    )[1:-1]
    assembler = OutputAssembler(_tokenizer(), stops=[inside], ids_through_stop=True)
    released = _all_ids(_run(assembler, [ids]))
    assert assembler.matched_stop == inside
    assert inside in _tokenizer().decode(released)
    assert inside not in _tokenizer().decode(released[:-1])
