"""What has been said in a chat."""

from lockstep.client.requests import Chat, ChatMessage


class Conversation:
    """A system message, if any, and turns of question and answer. For one thread."""

    def __init__(self, system: str = "") -> None:
        self._system = system
        self._turns: list[ChatMessage] = []

    def asked(self, question: str) -> Chat:
        """The conversation with that question at its end; it is not kept."""
        system = [ChatMessage("system", self._system)] if self._system else []
        return Chat([*system, *self._turns, ChatMessage("user", question)])

    def add(self, question: str, answer: str) -> None:
        """Keeps a turn."""
        self._turns += [ChatMessage("user", question), ChatMessage("assistant", answer)]

    def reset(self, system: str | None = None) -> None:
        """Forgets all turns; None keeps the system message, "" drops it."""
        self._turns.clear()
        if system is not None:
            self._system = system
