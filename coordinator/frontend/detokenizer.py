"""Token ids -> text, a few ids at a time."""

from collections.abc import Iterable

from coordinator.frontend.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one request's output ids into text as they come.

    The pieces that `push` and `flush` return join to `tokenizer.decode(ids, skip_special_tokens)`
    of all ids pushed, for any ids. A piece never ends inside a character: bytes that a later token
    may complete are held. Each token costs a constant amount of work. For one thread.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stages = tokenizer.new_decoder_stages()

    @property
    def pending(self) -> bool:
        """Whether text of an id pushed so far is still held."""
        return any(stage.pending for stage in self._stages)

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next output ids; returns the text that they complete.

        Ids without a token and, if so asked, special tokens give no text, as in the library.
        """
        return "".join(map(self._push_one, ids))

    def flush(self) -> str:
        """Returns what is held, incomplete characters replaced by U+FFFD; ends the request."""
        pieces: list[str] = []
        for index, stage in enumerate(self._stages):
            pieces.append(self._through(stage.end(), index + 1))
        return "".join(pieces)

    def _push_one(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._through((token,), 0)

    def _through(self, pieces: Iterable[str], first_stage: int) -> str:
        for stage in self._stages[first_stage:]:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
        return "".join(pieces)
