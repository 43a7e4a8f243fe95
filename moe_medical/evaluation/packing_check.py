"""Whether a model keeps the samples of a packed row apart when only their positions tell.

It is tried, not looked up, in two ways that see different faults:
- Other tokens in the first sample must not move the logits of the others. Where nothing leaks they are
  bitwise the same, in every precision.
- Samples run one by one must give the same logits, up to rounding: positions are understood.
A model that takes no notice of positions, or that refuses them, is told by its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from moe_medical.data.batches import Batch, collate, collate_packed
from moe_medical.data.chat import Encoded
from moe_medical.evaluation.loss import run_model

Bind = Callable[[Batch], AbstractContextManager[object]]

_LENGTHS = (7, 5, 9)
_LEAK = 1e-3
_SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
_SAME_ROUNDED = 0.05
"""In the lower precisions; all three relative to the largest logit."""


@torch.no_grad()
def why_not_packed(
    model: nn.Module, device: torch.device, bind: Bind = lambda _: nullcontext()
) -> str | None:
    """None where packed rows give the logits of separate ones, else the reason.

    Collective where the model's forward pass is: every rank must call. Leaves dropout as it was.

    Args:
        model: A causal LM.
        device: Its.
        bind: Tells the model what it needs to know of a batch.
    """
    was_training = model.training
    model.eval()
    try:
        leak, difference = _leak_and_difference(model, device, bind)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        return f"the model refuses packed rows ({type(e).__name__})"
    finally:
        model.train(was_training)
    if leak > _LEAK:
        return f"samples of one row see each other: logits move by {leak:.2g} of the largest"
    if difference > _SAME.get(next(model.parameters()).dtype, _SAME_ROUNDED):
        return f"packed samples are not as they are alone: logits differ by {difference:.2g} of the largest"
    return None


def _leak_and_difference(model: nn.Module, device: torch.device, bind: Bind) -> tuple[float, float]:
    size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    samples = _samples(size)
    changed = Encoded([(i + 1) % size for i in samples[0].input_ids], 1, 0)
    where = (model, device, bind)
    alone = torch.cat([_logits(collate([sample], [0], 0), *where)[0] for sample in samples])
    together, others = (_logits(_two_rows(of), *where) for of in (samples, [changed, *samples[1:]]))
    leak = (together - others)[:, _LENGTHS[0] :].abs().max()
    return float(leak / alone.abs().max()), float((together - alone).abs().max() / alone.abs().max())


def _two_rows(samples: list[Encoded]) -> Batch:
    """The same row twice: some attention kernels keep samples apart in batches of one row only."""
    return collate_packed([[(sample, 0) for sample in samples]] * 2, 0)


def _samples(size: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    return [Encoded(torch.randint(0, size, (n,), generator=generator).tolist(), 1, 0) for n in _LENGTHS]


def _logits(batch: Batch, model: nn.Module, device: torch.device, bind: Bind) -> torch.Tensor:
    """Logits of every position, shape (B, S, vocabulary), float32."""
    everywhere = torch.arange(batch.input_ids_BS.shape[1], device=device)
    batch = batch.to(device)
    with bind(batch):
        return run_model(model, batch, everywhere).float()
