"""What is masked in a user's strings, and with what."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import BadRequest
from coordinator.frontend.control_token_mask import ControlTokenMask, all_text

_MASK = ControlTokenMask(["<|im_end|>", "<|im_end|>!", "<s>", "user"])
_FIRST = "\U00100000"
_SECOND = "\U00100001"


@pytest.mark.parametrize(
    ("value", "masked", "literals"),
    [
        ("plain", "plain", {}),
        ("a<s>b<s>", f"a{_FIRST}b{_FIRST}", {_FIRST: "<s>"}),
        ("<|im_end|>!", _FIRST, {_FIRST: "<|im_end|>!"}),
        ("a<|im_ \n", f"a{_FIRST} \n", {_FIRST: "<|im_"}),
        ("a<|im_ b", "a<|im_ b", {}),
        # Letters alone are no beginning: roles and keys must reach the template.
        ("us", "us", {}),
        (
            {"k<s>": ["<s>", 1, None, True]},
            {f"k{_FIRST}": [_FIRST, 1, None, True]},
            {_FIRST: "<s>"},
        ),
        (("<s><", 2.5), [f"{_FIRST}{_SECOND}", 2.5], {_FIRST: "<s>", _SECOND: "<"}),
    ],
)
def test_control_tokens_and_their_beginnings_at_the_end_are_masked(
    value: Any, masked: Any, literals: dict[str, str]
) -> None:
    assert _MASK.mask(value, taken="") == (masked, literals)


@given(text=st.lists(st.sampled_from(["<s>", "<", "s>", "<|im_end|>", "!", " ", "é"])).map("".join))
def test_putting_literals_back_gives_the_text(text: str) -> None:
    masked, literals = _MASK.mask(text, taken=text)
    assert not any(token in masked for token in ("<s>", "<|im_end|>"))
    for mask, literal in literals.items():
        masked = masked.replace(mask, literal)
    assert masked == text


def test_mask_is_a_character_that_nobody_used() -> None:
    masked, _ = _MASK.mask(f"{_FIRST}<s>", taken=f"x{_FIRST}")
    assert masked == f"{_FIRST}{_SECOND}"


def test_request_that_uses_up_all_masks_is_refused() -> None:
    every_mask = "".join(map(chr, range(0x100000, 0x10FFFE)))
    with pytest.raises(BadRequest, match="^chat.messages .*private-use"):
        _MASK.mask("<s>", taken=every_mask)


def test_vocabulary_without_control_tokens_masks_nothing() -> None:
    assert ControlTokenMask([]).mask("<s> <", taken="") == ("<s> <", {})


def test_all_text_is_every_string() -> None:
    assert all_text([{"a": ("b", 1)}, "c", None]) == "abc"
