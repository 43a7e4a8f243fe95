"""Masks that are drawn again instead of kept."""

from __future__ import annotations

import pytest
import torch

from moe_medical.adapters.dropout import Dropout


def test_a_mask_is_drawn_again_as_it_was_and_from_the_global_state():
    x = torch.empty(300, 401)  # no multiple of what one random word decides about
    torch.manual_seed(3)
    dropout = Dropout(x.device, 0.05)
    first, other = dropout.mask(x), Dropout(x.device, 0.05).mask(x)
    assert torch.equal(first, dropout.mask(x, again=True))
    assert not torch.equal(first, other)
    torch.manual_seed(3)
    assert torch.equal(first, Dropout(x.device, 0.05).mask(x))
    assert dropout.keep == pytest.approx(0.95, abs=1 / 65536)
    kept = first.double().mean().item()
    assert kept == pytest.approx(dropout.keep, abs=4 * (0.05 * 0.95 / x.numel()) ** 0.5)
    columns = first.double().mean(0)  # no position of a word is special
    assert all(abs(columns[i::4].mean().item() - 0.95) < 0.005 for i in range(4))
