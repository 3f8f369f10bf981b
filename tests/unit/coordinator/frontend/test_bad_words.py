"""Bad words become the token sequences in which a model would say them."""

import pytest

from coordinator.errors import BadRequest
from coordinator.frontend.bad_words import bad_word_ids
from coordinator.frontend.tokenizer import Tokenizer
from tests.unit.coordinator.frontend.small_tokenizers import STREAMING_KINDS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(STREAMING_KINDS["byte_level"](), {})


def test_word_is_spelled_alone_and_after_a_space(tokenizer: Tokenizer) -> None:
    sequences = bad_word_ids(tokenizer, ["hello"])
    assert [tokenizer.decode(ids) for ids in sequences] == ["hello", " hello"]


def test_spellings_that_are_the_same_count_once(tokenizer: Tokenizer) -> None:
    once = bad_word_ids(tokenizer, ["hello", " hello"])
    assert once == bad_word_ids(tokenizer, ["hello"])


def test_word_of_too_many_tokens_is_refused_by_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match=r"bad_words\[1\] is 'qqq.* 1 to 16 tokens, not of 17"):
        bad_word_ids(tokenizer, ["a", "q" * 17])
