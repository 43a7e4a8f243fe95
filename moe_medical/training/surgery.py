"""Gradient surgery: the tasks' gradients of a global step, combined by a rule of `torchjd`.

Every rule gives the combination as one number for each task, found from the inner products of the gradients:
g = sum_i a_i g_i. So a step takes two passes. The first has a backward for each task, and its Gram matrix is
all that stays; the second is the usual step with a_i as weight of task i's loss, in which DeepSpeed reduces,
clips and updates as ever and the router losses enter unchanged. Dropout is the same in both.

g_i is the gradient of task i's part of the loss, the mixture's share included, so that a_i = 1 everywhere is
the plain step. It is what PCGrad and UPGrad give where no task is in another's way. Numbers of rules that
average are multiplied by the number of tasks; Nash-MTL's, whose size is arbitrary, get a mean of 1.

References: PCGrad, Yu et al. 2020; UPGrad, Quinton and Rey 2024; IMTL-G, Liu et al. 2021; MGDA, Sener and
Koltun 2018; Aligned-MTL, Senushkin et al. 2023; CAGrad, Liu et al. 2021; Nash-MTL, Navon et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_medical.adapters.routing import RoutingContext
from moe_medical.data.batches import Batch
from moe_medical.distributed.engine import Engine
from moe_medical.training.task_gradients import Weigh, kept_generators, task_gram

_CAGRAD_RADIUS = 0.5  # c of the paper, which uses 0.4 and 0.5


def surgery_weights(
    rule: str,
    engine: Engine,
    context: RoutingContext,
    batches: Sequence[Batch],
    weigh: Weigh,
    num_tasks: int,
    seed: int,
) -> np.ndarray:
    """What to multiply each task's loss with in the step on these batches.

    Collective: every rank must call. Costs a forward pass and a backward pass for each task, and
    (tasks x trainable parameters) float32 of memory.

    Args:
        rule: A name of the run file's `Surgery`, not `none`.
        engine: About to do the step.
        context: Of its layers.
        batches: This rank's micro-batches, on the device.
        weigh: Weights of the target tokens in the plain loss of the global step.
        num_tasks: T.
        seed: The same on all ranks; PCGrad draws the order in which tasks are compared.

    Returns:
        Shape (T,); 1 for tasks that the global step does not have.
    """
    with kept_generators(engine.topology.device):
        gram_TT = task_gram(engine, context, batches, weigh, num_tasks)
    return combination(rule, gram_TT, seed)


def combination(rule: str, gram_TT: np.ndarray, seed: int) -> np.ndarray:
    """a_i of g = sum_i a_i g_i; 1 where a gradient is zero.

    Args:
        rule: A name of the run file's `Surgery`, not `none`.
        gram_TT: <g_i, g_j>.
        seed: Of PCGrad.
    """
    present = np.diag(gram_TT) > 0
    numbers = np.ones(len(gram_TT))
    count = int(present.sum())
    if count > 1:
        # Rules have absolute thresholds; their results do not depend on the scale otherwise.
        gram = torch.from_numpy(gram_TT[np.ix_(present, present)] / np.diag(gram_TT).sum())
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            numbers[present] = _RULES[rule](gram).numpy()
    return numbers


# torchjd is an extra, so each rule imports its own. Where its weights sum to 1 they are brought to a mean
# of 1, which keeps the step as large as the plain one's.


def _pcgrad(gram: Tensor) -> Tensor:
    from torchjd.aggregation import PCGradWeighting

    return PCGradWeighting()(gram)


def _upgrad(gram: Tensor) -> Tensor:
    from torchjd.aggregation import UPGradWeighting

    return len(gram) * UPGradWeighting()(gram)


def _imtl_g(gram: Tensor) -> Tensor:
    from torchjd.aggregation import IMTLGWeighting

    return len(gram) * IMTLGWeighting()(gram)


def _mgda(gram: Tensor) -> Tensor:
    from torchjd.aggregation import MGDAWeighting

    return len(gram) * MGDAWeighting()(gram)


def _aligned_mtl(gram: Tensor) -> Tensor:
    from torchjd.aggregation import AlignedMTLWeighting

    return len(gram) * AlignedMTLWeighting()(gram)


def _cagrad(gram: Tensor) -> Tensor:
    from torchjd.aggregation import CAGradWeighting

    return len(gram) * CAGradWeighting(c=_CAGRAD_RADIUS)(gram)


def _nash_mtl(gram: Tensor) -> Tensor:
    """A new one in each step: its memory of earlier steps would be lost when a run resumes."""
    from torchjd.aggregation import NashMTL

    values, vectors = torch.linalg.eigh(gram)
    factor = vectors * values.clamp(min=0).sqrt()  # has the Gram matrix of the gradients
    numbers = NashMTL(n_tasks=len(gram), max_norm=0.0).weighting(factor)
    return numbers / numbers.mean()


_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "pcgrad": _pcgrad,
    "upgrad": _upgrad,
    "imtl_g": _imtl_g,
    "mgda": _mgda,
    "aligned_mtl": _aligned_mtl,
    "cagrad": _cagrad,
    "nash_mtl": _nash_mtl,
}
