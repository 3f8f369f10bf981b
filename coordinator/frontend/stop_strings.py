"""Finds stop strings in text that comes in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Releases text up to the first stop string; holds only what could be the beginning of one.

    The first match is the one that is complete first, of several complete at the same character
    the longest. So the result does not depend on how the text is cut into pieces. For one thread.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """`stops` are searched for as they are; none may be empty.

        `include_stop` releases the one that matched with the text before it.
        """
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes more text; returns the text that is now certain, and the stop that matched.

        After a match nothing more may be pushed.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        match = self._first_match(text)
        if match is not None:
            start, stop = match
            self._held = ""
            end = start + len(stop) if self._include_stop else start
            return text[:end], stop
        kept = len(text) - self._num_held(text)
        self._held = text[kept:]
        return text[:kept], None

    def flush(self) -> str:
        """Returns what is held, as no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = ((text.find(stop), stop) for stop in self._stops)
        matches = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
