"""Kinds of routers: a row for each, with all that the rest of the package asks of a kind. Torch-free.

Nobody else compares `adapters.router` with a name. What a router computes is a class of the same name in
`adapters/routers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moe_medical.config.adapters import MoloraConfig

TASK_FEATURES = 64
"""Numbers that a task router knows a task by (MOELoRA, arXiv 2310.18339)."""

Sizes = Callable[["MoloraConfig", int], tuple[int, ...]]


def _linear(at: MoloraConfig, in_features: int) -> tuple[int, ...]:
    return _weight_and_bias(at, at.num_experts, in_features)


def _tasks(at: MoloraConfig, in_features: int) -> tuple[int, ...]:
    return at.num_tasks * TASK_FEATURES, at.num_experts * TASK_FEATURES


def _weight_and_bias(at: MoloraConfig, rows: int, in_features: int) -> tuple[int, ...]:
    return (rows * in_features, rows) if at.router_bias else (rows * in_features,)


@dataclass(frozen=True)
class RouterKind:
    """What is true of a kind of router, whatever its settings."""

    decides_per: Literal["token", "task", "prompt", "text"] = "token"
    """What one decision holds for. `text`: gates of each token, out of a first pass over the whole text, by
    one classifier for all layers."""
    knows_tasks: bool = False
    """Whether it has an embedding for each task, and is told the tasks of its tokens."""
    can_be_fitted: bool = False
    """Whether `moe-medical router fit` can make it, which makes linear ones."""
    chooses_number: bool = False
    """Whether it decides how many experts a token uses, so that top_k cannot."""
    has_groups: bool = False
    """Whether its experts are in `groups`."""
    sizes: Sizes = _linear
    """(settings at a layer's depth, D) -> numbers in each parameter, in the order of the constructor."""

    @property
    def has_input(self) -> bool:
        """Whether each layer's router reads that layer's input."""
        return self.decides_per in ("token", "prompt")


ROUTER_KINDS: dict[str, RouterKind] = {
    "token": RouterKind(can_be_fitted=True),
    "task": RouterKind("task", knows_tasks=True, sizes=_tasks),
    "joint": RouterKind(
        knows_tasks=True, sizes=lambda at, features: (*_linear(at, features), *_tasks(at, features))
    ),
    "sequence": RouterKind("prompt", can_be_fitted=True),
    "threshold": RouterKind(
        chooses_number=True, sizes=lambda at, features: (*_linear(at, features), features, 1)
    ),
    "hierarchical": RouterKind(
        has_groups=True,
        sizes=lambda at, features: (*_linear(at, features), *_weight_and_bias(at, at.groups, features)),
    ),
    # Its classifier belongs to the model, not to a layer.
    "xlora": RouterKind("text", sizes=lambda at, features: ()),
}
"""`adapters.router` -> its kind."""
