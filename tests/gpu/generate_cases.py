"""What the GPU tests of Generate ask of a served group; any device serves, for a trial run."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tests.helpers.message_client import Client, ids_request
from tests.helpers.served_group import ServedGroup

NUM_TOKENS = 64
_LIMIT_S = 300.0
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at",
    "List three primary colours:\n1.",
    "Ein kurzer Satz auf Deutsch:",
    "E = mc^2 is",
    "In 1969, Neil Armstrong",
)


def greedy_outputs(
    model: Path,
    folder: Path,
    num_ranks: int,
    prompts: Sequence[Sequence[int]],
    *flags: str,
    on: str = "gpus",
) -> tuple[list[list[int]], str]:
    """Each prompt's greedy ids, all streamed at once, and the group's log; `on` gpus or cpu."""
    devices = "cpu" if on == "cpu" else ",".join(map(str, range(num_ranks)))
    where = ("--devices", devices, "--tp", str(num_ranks))
    with ServedGroup(model, folder, *where, *flags) as group:
        with group.client() as client, concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            outputs = list(pool.map(lambda prompt: _greedy(client, prompt), prompts))
        return outputs, group.log_text()


def _greedy(client: Client, prompt: Sequence[int]) -> list[int]:
    request = ids_request(prompt, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    generation = client.generate(request, timeout_s=_LIMIT_S)
    return [token for delta in generation for token in delta.token_ids]


def worst_gap(
    oracle: transformers.PreTrainedModel, prompt: Sequence[int], output: list[int]
) -> float:
    """By how much a chosen token's logit is below transformers' largest one, at its worst."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    chosen = logits[torch.arange(len(output)), torch.tensor(output)]
    return float((logits.max(-1).values - chosen).max())
