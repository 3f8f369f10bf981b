"""One request's output ids -> what the client gets: text together with its ids."""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from coordinator.errors import TextUnavailable
from coordinator.frontend.detokenizer import IncrementalDetokenizer
from coordinator.frontend.stop_strings import StopMatcher
from coordinator.frontend.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """New output. Texts of all deltas join to the whole text, ids to the whole output."""

    text: str
    token_ids: tuple[int, ...]


class OutputAssembler:
    """Releases ids only with the text they complete, and text only with the ids it comes from.

    After every delta the text released is exactly the text of the ids released, so a client that
    lost its connection can resume with the ids it has and neither misses nor repeats a character.
    Three things hold back: bytes of an unfinished character, text that may begin a stop string,
    and the rest of a token that is partly held.

    At a stop string the text ends before it (behind it with `include_stop`), even inside a token;
    the ids end with the last token that is wholly in that text, and only those are counted. A stop
    id (`stop_ids`) is released and counted like any other but adds no text. Without a tokenizer
    there is no text and ids pass straight through. For one thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        stops: Sequence[str] = (),
        stop_ids: Collection[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        resume_output_ids: Sequence[int] = (),
        ids_through_stop: bool = False,
    ) -> None:
        """Starts an output, or continues the one that began with `resume_output_ids`.

        Stop strings are searched for in the text of what follows the first `min_tokens` tokens.
        The resumed ids count and may begin a stop string, but they and their text are not released
        again; if they contain a whole one, `matched_stop` is set at once. With `ids_through_stop`
        the ids go up to the one that completes the stop string: for callers that make the text of
        them by themselves. Raises TextUnavailable for stop strings without a tokenizer.
        """
        if stops and tokenizer is None:
            raise TextUnavailable("stop strings need a tokenizer, and this checkpoint has none")
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
            if tokenizer is not None
            else None
        )
        self._matcher = StopMatcher(stops, include_stop)
        self._has_stops = bool(stops)
        self._stop_ids = frozenset(stop_ids)
        self._min_tokens = min_tokens
        self._ids_through_stop = ids_through_stop
        self._num_pushed = 0
        self._is_finished = False
        # Lengths in characters from the start of the output: what was detokenised, what is
        # certain to be shown (the matcher let it pass), what the client has.
        self._num_detokenised = 0
        self._num_certain = 0
        self._num_released = 0
        # The last of the certain text, at least what is not released.
        self._certain_text = ""
        # Ids not yet released: first those after which no unfinished character was held, each
        # group with the length of the text up to its end, then those after which one still is.
        # Only the former are points from which another detokeniser could go on.
        self._complete: deque[tuple[int, int]] = deque()
        self._incomplete: list[int] = []
        self.matched_stop: str | None = None
        """The stop string that ended the output; None while none has."""
        self.num_output_tokens = 0
        """Ids released so far, resumed ones included: what is billed."""
        self._resume(resume_output_ids)

    def push(self, ids: Sequence[int], finished: bool) -> Delta:
        """Takes the next output ids; `finished` says that none follow. Returns what to send.

        After a stop string matched, everything is dropped: the engine learns of it late.
        """
        if self.matched_stop is not None:
            return Delta("", ())
        assert not self._is_finished, "push after finished"
        if not finished:
            text = self._settled_text(ids)
            if text is not None:
                return self._pass_on(text, ids)
        self._is_finished = finished
        self._take(ids)
        if finished and self.matched_stop is None:
            self._end()
        return self._release()

    def _settled_text(self, ids: Sequence[int]) -> str | None:
        """Text of ids that can go out at once, as most can; None where one must be looked at.

        Without stop strings nothing but an unfinished character holds text back.
        """
        if self._detokenizer is None or self._has_stops:
            return None
        return self._detokenizer.settled(ids) if self._stop_ids.isdisjoint(ids) else None

    def _pass_on(self, text: str, ids: Sequence[int]) -> Delta:
        """Nothing was held, and nothing is now."""
        num_chars = len(text)
        self._num_pushed += len(ids)
        self._num_detokenised += num_chars
        self._num_certain += num_chars
        self._num_released += num_chars
        self.num_output_tokens += len(ids)
        return Delta(text, tuple(ids))

    def _resume(self, ids: Sequence[int]) -> None:
        self._take(ids)
        # The client has all of this: at the time, what held it back had been resolved.
        self._num_released = self._num_detokenised
        self._certain_text = ""
        self._complete.clear()
        self._incomplete.clear()
        self.num_output_tokens = len(ids)

    def _take(self, ids: Iterable[int]) -> None:
        for token_id in ids:
            self._num_pushed += 1
            self._take_one(token_id)
            if self.matched_stop is not None:
                return

    def _take_one(self, token_id: int) -> None:
        if self._detokenizer is None:
            self._complete.append((token_id, 0))
            return
        text = "" if token_id in self._stop_ids else self._detokenizer.push_one(token_id)
        self._incomplete.append(token_id)
        self._add_text(text, completes_ids=not self._detokenizer.pending)

    def _add_text(self, text: str, *, completes_ids: bool) -> None:
        self._num_detokenised += len(text)
        if completes_ids:
            self._complete += [(token_id, self._num_detokenised) for token_id in self._incomplete]
            self._incomplete.clear()
        if self._num_pushed > self._min_tokens:
            text, self.matched_stop = self._matcher.push(text)
        self._add_certain(text)

    def _add_certain(self, text: str) -> None:
        self._num_certain += len(text)
        self._certain_text += text

    def _end(self) -> None:
        if self._detokenizer is not None:
            self._add_text(self._detokenizer.flush(), completes_ids=True)
        if self.matched_stop is None:
            self._add_certain(self._matcher.flush())

    def _release(self) -> Delta:
        ids: list[int] = []
        end = self._num_released
        while self._complete and self._complete[0][1] <= self._num_certain:
            token_id, id_end = self._complete.popleft()
            ids.append(token_id)
            end = max(end, id_end)
        if self.matched_stop is not None and self._ids_through_stop:
            ids += [token_id for token_id, _ in self._complete] + self._incomplete
        if self.matched_stop is not None or self._is_finished:
            # The text may end inside a token; after a resume, before what the client has.
            end = max(end, self._num_certain)
        start = self._num_certain - len(self._certain_text)
        text = self._certain_text[max(self._num_released - start, 0) : end - start]
        self._certain_text = self._certain_text[max(end - start, 0) :]
        self._num_released = end
        self.num_output_tokens += len(ids)
        return Delta(text, tuple(ids))
