"""Log-likelihood of a continuation after a context, as evaluation harnesses ask for it.

Where a text is cut matters: the continuation's tokens are those of context + continuation behind
the first k, k being the number of tokens of the context alone. White space at the end of a context
goes to the continuation before, since tokenizers join it to the word that follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.client.requests import GenerateRequest, SamplingParams
from lockstep.client.results import Completion, Score
from lockstep.client.statuses import failure

ScoredText = str | Sequence[int]


@dataclass(frozen=True)
class ScoredPair:
    """A context and what follows it: both texts, or both token ids."""

    context: ScoredText
    prompt: ScoredText
    """The context with its continuation."""

    def count_request(self) -> GenerateRequest | None:
        """A call that tells how many tokens the context has; None where that is known."""
        if not isinstance(self.context, str):
            return None
        return GenerateRequest(self.context, SamplingParams(temperature=0.0, max_tokens=1))

    def request(self) -> GenerateRequest:
        """The call that scores: the prompt's log-probabilities, and the one token it must make."""
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        return GenerateRequest(self.prompt, params)

    def num_context_tokens(self, counted: Completion | None) -> int:
        """From the answer to `count_request`."""
        return len(self.context) if counted is None else counted.started.prompt_token_count


def scored_pair(context: ScoredText, continuation: ScoredText) -> ScoredPair:
    """Raises ValueError if one is empty, TypeError for a text beside token ids."""
    for name, value in (("context", context), ("continuation", continuation)):
        if len(value) == 0:
            raise ValueError(
                f"{name} is empty; a token is scored after another one, "
                "so an empty context is to be the model's first token (BOS, else EOS) as an id"
            )
    if isinstance(context, str) and isinstance(continuation, str):
        kept = context.rstrip()
        if not kept:
            raise ValueError(f"context is {context!r}; it must hold more than white space")
        return ScoredPair(kept, context + continuation)
    if isinstance(context, str) or isinstance(continuation, str):
        raise TypeError("context and continuation must both be texts, or both token ids")
    return ScoredPair(tuple(context), (*context, *continuation))


def score_of(answer: Completion, num_context_tokens: int) -> Score:
    """The continuation's part of a prompt's log-probabilities."""
    scored = answer.prompt_logprobs
    num_prompt_tokens = answer.started.prompt_token_count
    if scored is None or scored.first_position + len(scored.token_ids) != num_prompt_tokens:
        raise failure("INTERNAL", "the answer lacks log-probabilities of prompt tokens")
    if not 1 <= num_context_tokens < num_prompt_tokens:
        raise ValueError(
            f"the context has {num_context_tokens} tokens, with its continuation "
            f"{num_prompt_tokens}; the continuation must add at least one"
        )
    begin = num_context_tokens - scored.first_position
    token_ids, entries = scored.token_ids[begin:], scored.logprobs[begin:]
    return Score(
        token_ids=token_ids,
        logprobs=tuple(entry.logprob for entry in entries),
        is_greedy=all(
            entry.top_token_ids[0] == token_id
            for token_id, entry in zip(token_ids, entries, strict=True)
        ),
    )
