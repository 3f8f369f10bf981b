from __future__ import annotations

import pytest
import torch

from worker.sampling.philox import (
    gumbel_at_reference,
    gumbel_from_bits,
    gumbel_range_reference,
    philox_4x32,
)

# Known-answer vectors of Random123 (kat_vectors, philox4x32 with 10 rounds).
VECTORS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor(int(word, 16)) for word in counter.split())
    k0, k1 = (torch.tensor(int(word, 16)) for word in key.split())
    words = philox_4x32((c0, c1, c2, c3), (k0, k1))
    assert [f"{word.item():08x}" for word in words] == expected.split()


def test_noise_of_a_token_is_its_lane_of_the_block_at_its_position() -> None:
    seed, position, token_id = 0x299F31D0A4093822, 123_456, 151_642
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    zero = torch.tensor(0)
    block = philox_4x32((torch.tensor(position), torch.tensor(token_id >> 2), zero, zero), key)
    noise = gumbel_at_reference(
        torch.tensor([seed]), torch.tensor([position]), torch.tensor([[token_id]])
    )
    assert noise.item() == gumbel_from_bits(block[token_id & 3]).item()


@pytest.mark.parametrize("first_id", [0, 1, 2, 3, 64, 1346])
def test_noise_of_a_range_equals_noise_of_its_ids_wherever_the_range_begins(first_id: int) -> None:
    seed, position = torch.tensor([3, -1]), torch.tensor([0, 9])
    ids = torch.arange(first_id, first_id + 70).expand(2, 70)
    expected = gumbel_at_reference(seed, position, ids)
    assert torch.equal(gumbel_range_reference(seed, position, first_id, 70), expected)


def test_noise_changes_with_seed_position_and_token() -> None:
    ids = torch.arange(1000)[None]
    base = gumbel_at_reference(torch.tensor([1]), torch.tensor([1]), ids)
    for seed, position in ((2, 1), (1 + (1 << 32), 1), (1, 2)):
        other = gumbel_at_reference(torch.tensor([seed]), torch.tensor([position]), ids)
        assert int((base == other).sum()) < 3
    assert len(set(base[0].tolist())) > 990


def test_extreme_words_give_finite_noise() -> None:
    noise = gumbel_from_bits(torch.tensor([0, 1, 0xFFFFFFFF, 0xFFFFFF80]))
    assert noise.isfinite().all()
    # -log(-log1p(-2**-33)) and -log(-log1p(-(1 - 2**-24))).
    assert noise[0].item() == pytest.approx(22.8738, abs=1e-3)
    assert noise[2].item() == pytest.approx(-2.8114, abs=1e-3)


def test_noise_has_the_mean_and_variance_of_a_gumbel() -> None:
    noise = gumbel_range_reference(torch.tensor([11]), torch.tensor([5]), 0, 200_000)
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(1.64493, abs=0.03)
