"""SmolLM2 in float32, greedy: the same tokens as transformers, at TP=1, 2 and 3."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers

from protos.lockstep.v1 import generate_pb2
from tests.helpers.message_client import Client, chat_request, ids_request
from tests.helpers.served_group import ServedGroup
from tests.integration.conftest import SMOLLM2_FLAGS

pytestmark = pytest.mark.timeout(300)  # three real models on what may be two busy cores
NUM_TOKENS = 64
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

_Sequences = list[list[int]]
_Check = Callable[[Sequence[int], list[int]], None]


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: transformers.PreTrainedTokenizerBase) -> _Sequences:
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def oracle(smollm2_dir: Path) -> Iterator[transformers.PreTrainedModel]:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    num_threads = torch.get_num_threads()
    # Several threads meet after every operator, and beside other work one of them comes late.
    torch.set_num_threads(1)
    yield model.eval()
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def outputs_tp2(smollm2_tp2: ServedGroup, prompts: _Sequences) -> _Sequences:
    return generate_together(smollm2_tp2, prompts)


@pytest.fixture(scope="module", params=[1, 2, 3])
def outputs(
    request: pytest.FixtureRequest,
    smollm2_dir: Path,
    prompts: _Sequences,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[_Sequences]:
    """What a group answers to all prompts at once, by TP degree."""
    if request.param == 2:
        yield request.getfixturevalue("outputs_tp2")
        return
    folder = tmp_path_factory.mktemp(f"smollm2-tp{request.param}")
    with ServedGroup(smollm2_dir, folder, "--tp", str(request.param), *SMOLLM2_FLAGS) as group:
        yield generate_together(group, prompts)


@pytest.fixture(scope="module")
def check_greedy(
    oracle: transformers.PreTrainedModel,
) -> Callable[[Sequence[int], list[int]], None]:
    """Asserts that every output id is transformers' argmax after what comes before it.

    By induction that is what its greedy `generate` gives. One forward pass per distinct sequence.
    """
    known: set[tuple[int, ...]] = set()

    def check(prompt: Sequence[int], output: list[int]) -> None:
        if (*prompt, *output) in known:
            return
        with torch.inference_mode():
            logits = oracle(torch.tensor([[*prompt, *output]])).logits[0]
        best = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert output == best
        known.add((*prompt, *output))

    return check


def generate_together(group: ServedGroup, prompts: _Sequences) -> _Sequences:
    """Greedy ids of every prompt, streamed at the same time."""
    with group.client() as client, concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda prompt: greedy_ids(client, prompt), prompts))


def greedy_ids(client: Client, prompt: Sequence[int]) -> list[int]:
    request = ids_request(prompt, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    generation = client.generate(request, timeout_s=200)
    output = [token for delta in generation for token in delta.token_ids]
    assert generation.finished is not None
    assert generation.finished.finish_reason == generate_pb2.FINISH_REASON_LENGTH
    return output


def test_concurrent_streams_give_the_tokens_of_transformers(
    outputs: _Sequences,
    prompts: _Sequences,
    check_greedy: _Check,
) -> None:
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == NUM_TOKENS
        check_greedy(prompt, output)


def test_a_wrong_token_would_be_noticed(
    outputs_tp2: _Sequences,
    prompts: _Sequences,
    check_greedy: _Check,
) -> None:
    output = list(outputs_tp2[0])
    output[40] = (output[40] + 1) % 49152
    with pytest.raises(AssertionError):
        check_greedy(prompts[0], output)


def test_one_prompt_equals_generate_of_transformers(
    outputs_tp2: _Sequences, prompts: _Sequences, oracle: transformers.PreTrainedModel
) -> None:
    with torch.inference_mode():
        expected = oracle.generate(
            torch.tensor([prompts[0]]),
            attention_mask=torch.ones(1, len(prompts[0]), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=2,
            eos_token_id=-1,
        )
    assert outputs_tp2[0][:16] == expected[0, len(prompts[0]) :].tolist()


def test_chat_knows_the_capital_of_france(smollm2_tp2: ServedGroup) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with smollm2_tp2.client() as client:
        answer = client.generate_unary(
            chat_request(question, temperature=0.0, max_tokens=32), timeout_s=60
        )
    assert "Paris" in answer.output.text
    assert answer.finished.finish_reason == generate_pb2.FINISH_REASON_STOP
    assert answer.finished.stop_token_id == 2
