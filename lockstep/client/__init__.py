"""The Python client of lockstep.v1: sync and async, typed, with retries, deadlines and resume.

docs/client.md shows it. Nothing here imports torch, or anything of the daemons.
"""

from lockstep.client.async_client import AsyncClient
from lockstep.client.async_generation import AsyncGeneration
from lockstep.client.client import Client
from lockstep.client.config import ClientConfig, RetryPolicy, Tls
from lockstep.client.generation import Generation
from lockstep.client.requests import Chat, ChatMessage, GenerateRequest, Prompt, SamplingParams
from lockstep.client.results import (
    CommPath,
    CommTime,
    Completion,
    Delta,
    Finished,
    FinishReason,
    ModelInfo,
    PromptLogprobs,
    RankInfo,
    Sample,
    Score,
    ServerInfo,
    Started,
    TokenLogprobs,
    Usage,
)
from lockstep.errors import (
    AccessDenied,
    CallFailed,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    LockstepError,
    Overloaded,
    Unavailable,
)

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "AsyncGeneration",
    "CallFailed",
    "Cancelled",
    "Chat",
    "ChatMessage",
    "Client",
    "ClientConfig",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "Delta",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "Generation",
    "InvalidRequest",
    "LockstepError",
    "ModelInfo",
    "Overloaded",
    "Prompt",
    "PromptLogprobs",
    "CommPath",
    "CommTime",
    "RankInfo",
    "RetryPolicy",
    "Sample",
    "SamplingParams",
    "Score",
    "ServerInfo",
    "Started",
    "Tls",
    "TokenLogprobs",
    "Unavailable",
    "Usage",
]
