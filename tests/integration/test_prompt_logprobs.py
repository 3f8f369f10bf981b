"""Log-probabilities of prompts are those of transformers, in chunks, at TP=1, 2 and 3."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lockstep.client import ids_request
from protos.lockstep.v1 import generate_pb2
from tests.helpers.served_group import ServedGroup, value_of
from tests.integration.conftest import CPU_FLAGS
from tests.integration.test_batching import with_stub

pytestmark = pytest.mark.timeout(240)
_NUM_TOP = 5
# 32 to 48 blocks of 16 tokens for what would need 100; chunks of 48 tokens.
_FLAGS = ("--max-model-len", "256", *CPU_FLAGS)
_CACHE_BYTES = {1: "196K", 2: "196K", 3: "98K"}
_STEP_FLAGS = ("--max-num-seqs", "16", "--max-batch-tokens", "48")


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(5)
    return [draw.integers(3, 301, length).tolist() for length in (2, 47, 48, 49, 150, 90, 120)]


@pytest.fixture(scope="module")
def oracle(tiny_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[1, 2, 3])
def group(
    request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGroup]:
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    flags = ["--tp", str(request.param), *_FLAGS, *_STEP_FLAGS]
    flags += ["--kv-cache-bytes", _CACHE_BYTES[request.param]]
    with ServedGroup(tiny_dir, folder, *flags) as group:
        yield group


def check(
    oracle: transformers.PreTrainedModel, prompt: list[int], told: generate_pb2.PromptLogprobs
) -> None:
    with torch.no_grad():
        expected = torch.log_softmax(oracle(torch.tensor([prompt])).logits[0].double(), dim=-1)
    assert told.first_position == 1 and list(told.token_ids) == prompt[1:]
    for position, entry in enumerate(told.logprobs):
        row = expected[position]
        assert entry.logprob == pytest.approx(row[prompt[position + 1]].item(), abs=2e-3)
        best = row.topk(_NUM_TOP)
        assert list(entry.top_logprobs) == pytest.approx(best.values.tolist(), abs=2e-3)
        assert len(set(entry.top_token_ids)) == _NUM_TOP


def test_prompt_logprobs_are_those_of_transformers_under_load(
    group: ServedGroup, oracle: transformers.PreTrainedModel
) -> None:
    """Beside requests that push some of them out of their places."""

    async def one(stub: Any, prompt: list[int], wanted: bool) -> generate_pb2.PromptLogprobs:
        request = ids_request(prompt, max_tokens=60, temperature=0.0, ignore_eos=True)
        if wanted:
            request.sampling_params.prompt_logprobs = _NUM_TOP
        whole = generate_pb2.PromptLogprobs(first_position=1)
        num_tokens = 0
        async for event in stub.Generate(request, timeout=150):
            if event.WhichOneof("event") == "prompt_logprobs":
                assert not num_tokens, "a piece of the prompt after a token"
                piece = event.prompt_logprobs
                assert piece.first_position == 1 + len(whole.token_ids)
                whole.token_ids.extend(piece.token_ids)
                whole.logprobs.extend(piece.logprobs)
            num_tokens += len(event.delta.token_ids)
        assert num_tokens == 60
        return whole

    async def script(stub: Any) -> list[generate_pb2.PromptLogprobs]:
        others = [asyncio.create_task(one(stub, [9] * 60, False)) for _ in range(6)]
        told = await asyncio.gather(*(one(stub, prompt, True) for prompt in prompts()))
        for other in others:
            assert not (await other).token_ids
        return told

    for prompt, told in zip(prompts(), with_stub(group, script), strict=True):
        check(oracle, prompt, told)
    assert value_of(group.metrics, "lockstep_preemptions_total") > 0


def test_a_unary_answer_has_them_once_and_a_cached_prompt_too(
    group: ServedGroup, oracle: transformers.PreTrainedModel
) -> None:
    prompt = prompts()[4]
    with group.client() as client:
        for num_samples in (1, 3):
            request = ids_request(prompt, max_tokens=1, n=num_samples, prompt_logprobs=_NUM_TOP)
            answer = client.generate_unary(request)
            check(oracle, prompt, answer.prompt_logprobs)
            assert len(answer.further_samples) == num_samples - 1
        without = client.generate_unary(ids_request(prompt, max_tokens=1))
    assert not without.HasField("prompt_logprobs")
    assert without.finished.usage.cached_token_count > 0
