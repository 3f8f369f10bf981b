"""Log-likelihoods of a real model, equal to transformers' own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lockstep.client import AsyncClient, Client, ClientConfig
from tests.helpers.served_group import ServedGroup

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_CONFIG = ClientConfig(timeout_s=100.0)
_TOLERANCE = 2e-3  # float32 on two ranks against one process
_PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Berlin, of course"),
    ("The capital of France is ", "Paris"),
    ("Question: what is 2 + 2?\nAnswer:", " 4"),
    ("a b a b a b a b a b a b", " a b a b"),
]


class Oracle:
    """What transformers says of a pair, cut as evaluation harnesses cut it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )

    def ids(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        whole = self.tokenizer(context + continuation)["input_ids"]
        kept = self.tokenizer(context.rstrip())["input_ids"]
        return whole[: len(kept)], whole[len(kept) :]

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*context, *continuation]])).logits[0]
        rows = logits[len(context) - 1 : -1].log_softmax(-1)
        tokens = torch.tensor(continuation)
        total = float(rows[torch.arange(len(tokens)), tokens].sum())
        return total, bool((rows.argmax(-1) == tokens).all())


@pytest.fixture(scope="module")
def oracle(smollm2_dir: Path) -> Oracle:
    return Oracle(smollm2_dir)


def test_texts_and_their_ids_score_as_transformers_does(
    smollm2_tp2: ServedGroup, oracle: Oracle
) -> None:
    ids = [oracle.ids(*pair) for pair in _PAIRS]
    expected = [oracle.score(*pair) for pair in ids]
    assert {is_greedy for _, is_greedy in expected} == {False, True}

    async def ask() -> list[tuple[float, bool]]:
        async with AsyncClient(smollm2_tp2.address, _CONFIG) as client:
            return await client.loglikelihood(_PAIRS)

    with Client(smollm2_tp2.address, _CONFIG) as client:
        for scores in (client.loglikelihood(_PAIRS), client.loglikelihood(ids), asyncio.run(ask())):
            assert [is_greedy for _, is_greedy in scores] == [greedy for _, greedy in expected]
            assert [total for total, _ in scores] == pytest.approx(
                [total for total, _ in expected], abs=_TOLERANCE
            )


def test_a_long_context_is_scored_whole(smollm2_tp2: ServedGroup, oracle: Oracle) -> None:
    ids = [3 + (7 * number) % 1000 for number in range(700)]
    total, _ = oracle.score(ids[:1], ids[1:])
    with Client(smollm2_tp2.address, _CONFIG) as client:
        score = client.score(ids[:1], ids[1:])
    assert score.token_ids == tuple(ids[1:])
    assert score.logprob == pytest.approx(total, rel=1e-4)
