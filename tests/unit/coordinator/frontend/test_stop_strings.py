"""The streaming matcher against a search of the whole text."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.frontend.stop_strings import StopMatcher


def _naive(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop that is complete first, of several the longest; and the stop."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def _run(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops)
    released = []
    for piece in pieces:
        text, stop = matcher.push(piece)
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


_TEXT = st.text("abc", max_size=8)


@given(pieces=st.lists(_TEXT, max_size=8), stops=st.lists(st.text("abc", min_size=1, max_size=5)))
def test_streaming_finds_what_a_search_of_the_whole_text_finds(
    pieces: list[str], stops: list[str]
) -> None:
    released, stop = _run(pieces, stops)
    assert ("".join(released), stop) == _naive("".join(pieces), stops)


@given(pieces=st.lists(_TEXT, max_size=6), stops=st.lists(st.text("abc", min_size=1, max_size=5)))
def test_what_is_held_is_the_beginning_of_a_stop_and_nothing_else_is_held(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    released = ""
    for count, piece in enumerate(pieces, 1):
        text, stop = matcher.push(piece)
        released += text
        if stop is not None:
            return
        held = "".join(pieces[:count])[len(released) :]
        assert not held or any(begun.startswith(held) for begun in stops)
        could_begin = [
            end
            for end in range(len("".join(pieces[:count])))
            if any(begun.startswith("".join(pieces[:count])[end:]) for begun in stops)
        ]
        assert len(released) == min(could_begin, default=len("".join(pieces[:count])))


@pytest.mark.parametrize(
    ("pieces", "stops", "released", "match"),
    [
        (["hel", "lo"], ["lo"], ["he", "l"], "lo"),
        (["a\n", "\nb"], ["\n\n"], ["a", ""], "\n\n"),
        (["a\n", "b"], ["\n\n"], ["a", "\nb", ""], None),
        # The one complete first wins, though the other begins earlier.
        (["abcde"], ["abcde", "cd"], ["ab"], "cd"),
        # Of two complete together, the longer.
        (["xabc"], ["c", "abc"], ["x"], "abc"),
        (["aab"], ["ab"], ["a"], "ab"),
        (["anything"], [], ["anything", ""], None),
    ],
)
def test_first_match_ends_the_text(
    pieces: list[str], stops: list[str], released: list[str], match: str | None
) -> None:
    assert _run(pieces, stops) == (released, match)


def test_planted_fault_a_matcher_that_holds_nothing_misses_a_stop_across_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StopMatcher, "_num_held", lambda self, text: 0)
    assert _run(["a\n", "\nb"], ["\n\n"])[1] is None


def test_empty_stop_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="empty"):
        StopMatcher(["a", ""])
