"""KL divergence and agreement over slabs of the vocabulary, against whole logits in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmq_export.quantizer.calibration.divergence import Divergence, distance_of


def slow(full: torch.Tensor, quantized: torch.Tensor) -> tuple[list[float], list[bool]]:
    """One token at a time, by the definition, with all of the vocabulary in one piece."""
    kl, same = [], []
    for z, y in zip(full.double(), quantized.double()):
        p, q = z.log_softmax(0), y.log_softmax(0)
        kl.append(sum(float(a.exp() * (a - b)) for a, b in zip(p, q)))
        same.append(max(range(len(z)), key=z.tolist().__getitem__) == int(y.argmax()))
    return kl, same


def in_slabs(full, quantized, slab, chunk):
    found = Divergence(len(full))
    for start in range(0, full.shape[1], slab):
        rows = slice(start, start + slab)
        for first in range(0, len(full), chunk):
            at = slice(first, first + chunk)
            found.add(at, start, full[at, rows], quantized[at, rows])
    return found.distance()


@pytest.mark.parametrize(("slab", "chunk"), [(1, 1), (7, 3), (16, 64), (64, 5)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 60.0])  # 60: exp of a logit would overflow
def test_slabs_give_what_the_definition_gives(slab, chunk, spread):
    draw = torch.Generator().manual_seed(slab)
    full = spread * torch.randn(9, 41, generator=draw) + 800
    quantized = full + 0.1 * spread * torch.randn(9, 41, generator=draw)
    kl, same = slow(full, quantized)
    found = in_slabs(full, quantized, slab, chunk)
    assert torch.allclose(found.kl, torch.tensor(kl, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert found.same.tolist() == same


LOGITS = st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=12)


@settings(deadline=None)
@given(LOGITS, st.data(), st.integers(1, 12))
def test_no_divergence_is_negative_and_that_of_a_model_to_itself_is_none(z, data, slab):
    same_length = st.lists(st.floats(-80, 80, width=32), min_size=len(z), max_size=len(z))
    full, quantized = torch.tensor([z]), torch.tensor([data.draw(same_length)])
    found = in_slabs(full, quantized, slab, 1)
    assert float(found.kl) >= 0
    assert torch.allclose(found.kl, distance_of(full, quantized).kl, rtol=1e-9, atol=1e-9)
    own = in_slabs(full, full, slab, 1)
    assert float(own.kl) == 0 and bool(own.same)


def test_a_shift_of_all_logits_changes_nothing_and_a_shift_of_one_does():
    full = torch.linspace(-3, 3, 12).repeat(2, 1)
    assert float(distance_of(full, full + 5).kl.max()) < 1e-12
    other = full.clone()
    other[1, 0] += 9  # the least probable token becomes the most probable one
    found = distance_of(full, other)
    assert found.kl[0] == 0 and found.kl[1] > 0.5
    assert found.same.tolist() == [True, False]


def test_what_is_no_number_is_not_hidden():
    full = torch.zeros(1, 4)
    quantized = torch.tensor([[0.0, torch.nan, 0.0, 0.0]])
    assert bool(distance_of(full, quantized).kl.isnan())
