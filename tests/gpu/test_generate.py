"""Generate over NCCL ranks, through the public API."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.gpu.generate_cases import NUM_TOKENS, PROMPTS, greedy_outputs, worst_gap

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[2]
# Logits of SmolLM2 are some tens; float32 on another device is off by some 1e-5 of that.
MAX_GAP = 2e-3
PATH = "communication path all_reduce by one_shot: usable"


def on_gpus(count: int) -> pytest.MarkDecorator:
    reason = f"needs {count} GPU{'s' if count > 1 else ''}"
    return pytest.mark.skipif(count > NUM_GPUS, reason=reason)


DEGREES = [
    pytest.param(count, marks=[on_gpus(count), *([pytest.mark.multi_gpu] if count > 1 else [])])
    for count in (1, 2, 4)
]


@pytest.mark.parametrize("tp", DEGREES)
def test_smollm2_in_float32_has_the_greedy_tokens_of_transformers_and_of_tp_1(
    smollm2_dir: Path, tmp_path: Path, tp: int
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    flags = ("--dtype", "float32", "--max-model-len", "1024", "--gpu-memory-fraction", "0.3")
    outputs, log = greedy_outputs(smollm2_dir, tmp_path / "tp", tp, prompts, *flags)
    if tp > 1:
        assert PATH in log
        alone, _ = greedy_outputs(smollm2_dir, tmp_path / "one", 1, prompts, *flags)
        assert outputs == alone
    oracle = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output) == NUM_TOKENS
        assert worst_gap(oracle, prompt, output) < MAX_GAP
    wrong = [(token + 1) % 49152 for token in outputs[0]]
    assert worst_gap(oracle, prompts[0], wrong) > MAX_GAP, "the check sees no fault"


@pytest.mark.parametrize("tp", DEGREES)
def test_the_shape_of_llama_3_1_8b_runs_with_dummy_weights(tmp_path: Path, tp: int) -> None:
    model = ROOT / "bench" / "models" / "llama-3.1-8b"
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 128, 500)]
    flags = ("--load-format", "dummy", "--dtype", "bfloat16", "--max-model-len", "2048")
    outputs, log = greedy_outputs(model, tmp_path / "tp", tp, prompts, *flags)
    assert [len(output) for output in outputs] == [NUM_TOKENS] * len(prompts)
    assert all(0 <= token < 128256 for output in outputs for token in output)
    assert (PATH in log) == (tp > 1)
