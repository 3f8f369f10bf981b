from __future__ import annotations

import math

import torch

from worker.sampling.alternatives import local_alternatives, merge_alternatives


def test_best_of_all_shards_with_ties_in_the_order_of_ids() -> None:
    raw = torch.randint(0, 6, (40, 300), generator=torch.Generator().manual_seed(0)).float()
    keys = torch.stack([local_alternatives(raw[:, :100].clone(), 0),
                        local_alternatives(raw[:, 100:].clone(), 100)])  # fmt: skip
    normalizer = raw.logsumexp(dim=1)
    ids, logprobs = merge_alternatives(keys, normalizer)
    order = raw.sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids.long(), order.indices[:, :20])
    torch.testing.assert_close(logprobs, order.values[:, :20] - normalizer[:, None])


def test_places_past_a_small_vocabulary_are_empty() -> None:
    raw = torch.tensor([[1.0, 3.0, -math.inf, 2.0]])
    ids, logprobs = merge_alternatives(local_alternatives(raw, 0)[None], torch.tensor([0.0]))
    assert ids[0].tolist() == [1, 3, 0] + [-1] * 17
    assert logprobs[0, :3].tolist() == [3.0, 2.0, 1.0]
    assert (logprobs[0, 3:] == -math.inf).all()
