"""Whether a model keeps the samples of a packed row apart when only their positions tell.

It is tried, not looked up: the same samples run one by one and in one row must give the same logits. A model
that takes no notice of positions, or that refuses them, is told by its numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from moe_medical.data.batches import Batch, collate, collate_packed
from moe_medical.data.formats import Encoded
from moe_medical.evaluation.objective import run_model

_LENGTHS = (7, 5, 9)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDED = 0.05
"""Tolerance of the lower precisions; both relative to the largest logit. Leaks are some tenths."""


@torch.no_grad()
def why_not_packed(model: nn.Module, device: torch.device) -> str | None:
    """None where packed rows give the logits of separate ones, else the reason.

    Collective where the model's forward pass is: every rank must call. Leaves dropout as it was.
    """
    was_training = model.training
    model.eval()
    try:
        apart = _logits(model, [collate([sample], [0], 0) for sample in _samples(model)], device)
        together = _logits(model, [collate_packed([[(s, 0) for s in _samples(model)]], 0)], device)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return f"the model refuses packed rows ({type(e).__name__})"
    finally:
        model.train(was_training)
    difference = float((apart - together).abs().max() / apart.abs().max())
    allowed = _TOLERANCE.get(next(model.parameters()).dtype, _ROUNDED)
    if difference <= allowed:
        return None
    return f"samples of one row see each other: logits differ by {difference:.2g} of the largest"


def _samples(model: nn.Module) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    draws = [torch.randint(0, size, (n,), generator=generator).tolist() for n in _LENGTHS]
    return [Encoded(ids, 1, 0) for ids in draws]


def _logits(model: nn.Module, batches: list[Batch], device: torch.device) -> torch.Tensor:
    """Logits of every position, shape (tokens, vocabulary), float32."""
    found = []
    for batch in (b.to(device) for b in batches):
        everywhere = torch.arange(batch.input_ids_BS.shape[1], device=device)
        found.append(run_model(model, batch, everywhere).flatten(0, 1).float())
    return torch.cat(found)
