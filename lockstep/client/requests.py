"""What a client asks for. Names, units and limits are those of protos/lockstep/v1/generate.proto.

A field left at its default is not sent: the server takes the checkpoint's default, or its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

_TEXT_LISTS = ("stop", "bad_words", "choice")
_CONSTRAINTS = ("json_schema", "json_object", "regex", "lark_grammar", "choice", "gbnf_grammar")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when to stop. The server checks the values.

    Raises TypeError for one text where several are meant, ValueError for two constraints at once.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    n: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    json_schema: str | None = None
    json_object: bool | None = None
    regex: str | None = None
    lark_grammar: str | None = None
    choice: Sequence[str] = ()
    gbnf_grammar: str | None = None
    prompt_logprobs: int | None = None
    include_stop: bool | None = None

    def __post_init__(self) -> None:
        for name in _TEXT_LISTS:
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} is a text; it must be a list of texts")
        given = [name for name in _CONSTRAINTS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both set; one constraint at most")


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"] | str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation to answer, rendered by the server with the checkpoint's chat template."""

    messages: Sequence[ChatMessage]


Prompt = str | Chat | Sequence[int]
"""Text, a conversation, or token ids."""


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt and how to continue it."""

    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    request_id: str = ""
    model: str = ""
    resume_output_ids: Sequence[int] = ()
    priority: int = 0
    tenant: str = ""
    use_prefix_cache: bool | None = None
