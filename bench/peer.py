"""The best peer's figures, to print beside ours.

vLLM 0.24.0 (V1 engine, async scheduling, FlashAttention 3, torch.compile, full CUDA graphs, custom
all-reduce), in process, dummy bfloat16 weights, prefix cache off, 4 H200 of one host, 2026-11-22.
"""

from __future__ import annotations

PEER_NAME = "vllm-0.24.0"
PEER_GPU = "NVIDIA H200"

# (model, tp) -> case -> value; units as in the cases.
_FIGURES: dict[tuple[str, int], dict[str, float]] = {
    ("qwen3-0.6b", 1): {
        "decode-bs1": 1.82,
        "decode-bs8": 1.83,
        "decode-bs64": 2.65,
        "decode-bs256": 7.18,
        "offline256": 22004,
    },
    ("llama-3.1-8b", 1): {
        "decode-bs1": 4.90,
        "decode-bs8": 5.04,
        "decode-bs64": 6.09,
        "decode-bs256": 11.2,
        "ttft-128": 9.2,
        "ttft-1024": 26.7,
        "ttft-8192": 212,
        "offline256": 9472,
    },
    ("llama-3.1-8b", 2): {
        "decode-bs1": 3.49,
        "decode-bs8": 3.61,
        "decode-bs64": 4.14,
        "decode-bs256": 7.17,
        "ttft-128": 8.4,
        "ttft-1024": 20.5,
        "ttft-8192": 124,
    },
    ("llama-3.1-8b", 4): {
        "decode-bs1": 2.68,
        "decode-bs8": 2.74,
        "decode-bs64": 3.47,
        "decode-bs256": 5.42,
        "ttft-128": 8.5,
        "ttft-1024": 22.9,
        "ttft-8192": 80.5,
    },
    ("qwen3-14b", 1): {
        "decode-bs1": 8.61,
        "decode-bs8": 8.79,
        "decode-bs64": 9.99,
        "decode-bs256": 18.1,
        "offline256": 5890,
    },
    ("qwen3-14b", 2): {
        "decode-bs1": 5.58,
        "decode-bs8": 5.68,
        "decode-bs64": 6.82,
        "decode-bs256": 10.9,
        "offline256": 9760,
    },
    ("qwen3-32b", 4): {
        "decode-bs1": 7.19,
        "decode-bs8": 7.52,
        "decode-bs64": 8.84,
        "decode-bs256": 14.4,
        "offline256": 7722,
    },
    ("llama-3.1-70b", 4): {
        "decode-bs1": 12.4,
        "decode-bs8": 12.7,
        "decode-bs64": 14.7,
        "decode-bs256": 25.3,
        "ttft-128": 24.7,
        "ttft-1024": 91.2,
        "ttft-8192": 585,
        "offline256": 4431,
    },
}


def peer_figure(model: str, tp: int, case: str) -> float | None:
    """The peer's value for a case on H200, in the case's unit, or None where it has none."""
    return _FIGURES.get((model, tp), {}).get(case)
