"""Bad words as token sequences, which is all that the ranks know of text."""

from collections.abc import Sequence

from coordinator.errors import BadRequest
from coordinator.frontend.tokenizer import Tokenizer
from coordinator.sampling_limits import MAX_BAD_WORD_IDS


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """Each word as tokenised alone and after a space, which most tokenizers spell differently.

    A word inside a longer one may have other tokens still. Raises BadRequest for a word of too many
    tokens.
    """
    sequences: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if not 1 <= len(ids) <= MAX_BAD_WORD_IDS:
                limit = f"a text of 1 to {MAX_BAD_WORD_IDS} tokens, not of {len(ids)}"
                raise BadRequest(f"bad_words[{index}]", word, limit)
            sequences[tuple(ids)] = None
    return [list(ids) for ids in sequences]
