"""What the engine has to say to its frontends, gathered so that each result is one message."""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from coordinator.request import Request
from protos.lockstep.v1 import engine_pb2, generate_pb2


@dataclass
class FrontendOutputs:
    """New tokens and endings of one frontend's requests.

    For each of `handles` there are as many of `token_ids` as `token_counts` says.
    """

    accepted: list[int] = field(default_factory=list)  # handles
    handles: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[generate_pb2.TokenLogprobs] = field(default_factory=list)
    prompt_pieces: list[engine_pb2.PromptPiece] = field(default_factory=list)
    ended: list[engine_pb2.Ended] = field(default_factory=list)
    answers: list[engine_pb2.EngineMessage] = field(default_factory=list)

    def messages(self) -> list[engine_pb2.EngineMessage]:
        """Tokens before endings, so that a request's last tokens come before its end."""
        messages = []
        if self.handles or self.accepted or self.prompt_pieces:
            token_counts = np.array([0] * len(self.accepted) + self.token_counts, dtype="<i4")
            outputs = engine_pb2.Outputs(
                handles=np.array([*self.accepted, *self.handles], dtype="<i8").tobytes(),
                token_counts=token_counts.tobytes(),
                token_ids=np.array(self.token_ids, dtype="<i4").tobytes(),
                logprobs=self.logprobs,
                prompt_pieces=self.prompt_pieces,
            )
            messages.append(engine_pb2.EngineMessage(outputs=outputs))
        messages += [engine_pb2.EngineMessage(ended=ended) for ended in self.ended]
        return messages + self.answers


class Outbox:
    """Collects per frontend; `take` empties it."""

    def __init__(self) -> None:
        self.outputs_of: defaultdict[int, FrontendOutputs] = defaultdict(FrontendOutputs)
        """By frontend; where tokens are added."""

    def accept(self, request: Request) -> None:
        """Says that a request is in the queue: no tokens yet."""
        self.outputs_of[request.frontend].accepted.append(request.handle)

    def add_prompt_piece(self, request: Request, piece: engine_pb2.PromptPiece) -> None:
        """Log-probabilities of a piece of a request's prompt; its handle is set here."""
        piece.handle = request.handle
        self.outputs_of[request.frontend].prompt_pieces.append(piece)

    def add_end(self, frontend: int, ended: engine_pb2.Ended) -> None:
        """The last word about a request."""
        self.outputs_of[frontend].ended.append(ended)

    def add_answer(self, frontend: int, answer: engine_pb2.EngineMessage) -> None:
        """A message to follow the endings gathered so far."""
        self.outputs_of[frontend].answers.append(answer)

    def take(self) -> dict[int, list[engine_pb2.EngineMessage]]:
        """The messages for each frontend with any, in order; the outbox is empty afterwards."""
        taken = {index: outputs.messages() for index, outputs in self.outputs_of.items()}
        self.outputs_of.clear()
        return taken
