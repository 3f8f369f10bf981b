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
        self._is_memoryless = all(stage.is_memoryless for stage in self._stages)
        self._settled_texts = tokenizer.settled_texts(skip_special_tokens)
        self.pending = False
        """Whether text of an id pushed so far is still held."""

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next output ids; returns the text that they complete.

        Ids without a token and, if so asked, special tokens give no text, as in the library.
        """
        return "".join(map(self.push_one, ids))

    def push_one(self, token_id: int) -> str:
        """The same for one id."""
        if self.pending or not self._is_memoryless:
            return self._decode(token_id)
        text = self._settled_texts.get(token_id)
        if text is None:
            text = self._decode(token_id)
            if not self.pending:
                self._settled_texts[token_id] = text
        return text

    def settled(self, ids: Iterable[int]) -> str | None:
        """The same for ids whose texts are known to depend on no other id; None, and nothing is
        taken, if one is not."""
        if self.pending or not self._is_memoryless:
            return None
        texts = self._settled_texts
        try:
            return "".join([texts[token_id] for token_id in ids])
        except KeyError:
            return None

    def flush(self) -> str:
        """Returns what is held, incomplete characters replaced by U+FFFD; ends the request."""
        pieces: list[str] = []
        for index, stage in enumerate(self._stages):
            pieces.append(self._through(stage.end(), index + 1))
        self.pending = False
        return "".join(pieces)

    def _decode(self, token_id: int) -> str:
        token = self._tokenizer.token(token_id)
        if token is None:
            return ""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        text = self._through((token,), 0)
        self.pending = any(stage.pending for stage in self._stages)
        return text

    def _through(self, pieces: Iterable[str], first_stage: int) -> str:
        for stage in self._stages[first_stage:]:
            pieces = [text for piece in pieces for text in stage.feed(piece)]
        return "".join(pieces)
