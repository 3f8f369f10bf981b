"""Log-probabilities of a prompt, from the engine's packed form to the clients'."""

import numpy as np

from protos.lockstep.v1 import engine_pb2, generate_pb2


def prompt_logprobs(piece: engine_pb2.PromptPiece) -> generate_pb2.PromptLogprobs:
    """The same piece with one message per token."""
    logprobs = np.frombuffer(piece.logprobs, "<f4")
    shape = (len(logprobs), -1)
    top_ids = np.frombuffer(piece.top_token_ids, "<i4").reshape(shape).tolist()
    top_logprobs = np.frombuffer(piece.top_logprobs, "<f4").reshape(shape).tolist()
    return generate_pb2.PromptLogprobs(
        first_position=piece.first_position,
        token_ids=np.frombuffer(piece.token_ids, "<i4").tolist(),
        logprobs=[
            generate_pb2.TokenLogprobs(logprob=own, top_token_ids=ids, top_logprobs=values)
            for own, ids, values in zip(logprobs.tolist(), top_ids, top_logprobs, strict=True)
        ],
    )
