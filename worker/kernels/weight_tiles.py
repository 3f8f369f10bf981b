# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""How the kernels for few rows read weights, each of which is used once and never written."""

from __future__ import annotations

from worker.kernels.triton_language import jit, tl


@jit()
def load_weights(pointers, ks, left, EVEN_K: tl.constexpr):
    """A tile of weights; zero where `ks`, like the tile or broadcast to it, is not below `left`.

    With EVEN_K all of it is below.
    """
    # Evicted first, so that they do not drive the KV cache and the activations out of L2.
    if EVEN_K:
        tile = tl.load(pointers, eviction_policy="evict_first")
    else:
        tile = tl.load(pointers, mask=ks < left, other=0.0, eviction_policy="evict_first")
    return tile
