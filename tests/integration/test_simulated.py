"""The real coordinator over simulated workers: streams carry the tokens that were foreseen."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.helpers.message_client import Client, ids_request
from tests.helpers.served_group import ServedGroup
from tests.helpers.simulated_tokens import simulated_output
from worker.simulated.vocabulary import choose_vocabulary, config_vocab_size

pytestmark = pytest.mark.timeout(240)  # includes the start of the group, perhaps on busy cores
_LIMIT_S = 100.0
_SEED = 11
_STOP_PROBABILITY = 0.05


@pytest.fixture(scope="module")
def model_dir(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration and tokenizer without weights."""
    folder = tmp_path_factory.mktemp("no-weights")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2_dir / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def group(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGroup]:
    flags = ["--tp", "2", "--step-ms", "2", "--row-us", "20", "--jitter", "0.2"]
    flags += ["--seed", str(_SEED), "--token-text", "multibyte", "--num-blocks", "400"]
    flags += ["--stop-probability", str(_STOP_PROBABILITY), "--max-num-seqs", "16"]
    folder = tmp_path_factory.mktemp("group")
    with ServedGroup(model_dir, folder, *flags, subcommand="simulate") as served:
        yield served


@pytest.fixture(scope="module")
def vocabulary(model_dir: Path) -> list[int]:
    ids: list[int] = choose_vocabulary(
        model_dir, "multibyte", config_vocab_size(model_dir)
    ).tolist()
    return ids


def answer(client: Client, token_ids: list[int], **params: Any) -> tuple[list[int], str]:
    generation = client.generate(ids_request(token_ids, **params), timeout_s=_LIMIT_S)
    deltas = list(generation)
    ids = [token for delta in deltas for token in delta.token_ids]
    return ids, "".join(delta.text for delta in deltas)


def test_every_stream_has_the_foreseen_tokens_and_their_text(
    group: ServedGroup, model_dir: Path, vocabulary: list[int]
) -> None:
    prompts = [[100 + index, 7, 5000 + index] * (1 + index) for index in range(24)]
    stop_ids = [0, 2]
    params: dict[str, Any] = {"temperature": 0.8, "max_tokens": 40, "stop_token_ids": stop_ids}

    def ask(index: int) -> tuple[list[int], str]:
        return answer(client, prompts[index], seed=index + 1, ignore_eos=True, **params)

    with group.client() as client, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir)
    lengths = set()
    for index, (ids, text) in enumerate(answers):
        assert ids == simulated_output(
            prompts[index],
            40,
            vocabulary=vocabulary,
            daemon_seed=_SEED,
            request_seed=index + 1,
            stop_ids=stop_ids,
            stop_probability=_STOP_PROBABILITY,
        )
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        lengths.add(len(ids))
    assert len(lengths) > 4
    assert any(not text.isascii() for _, text in answers)


def test_greedy_requests_differ_in_nothing_but_their_prompt(
    group: ServedGroup, vocabulary: list[int]
) -> None:
    with group.client() as client:
        one, two = (
            answer(client, [9, 8, 7], temperature=0.0, max_tokens=30, ignore_eos=True, seed=seed)[0]
            for seed in (1, 2)
        )
    expected = simulated_output([9, 8, 7], 30, vocabulary=vocabulary, daemon_seed=_SEED)
    assert one == two == expected
