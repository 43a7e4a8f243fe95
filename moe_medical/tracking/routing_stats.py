"""Which task uses which expert, layer by layer, and what is wrong with it.

n[layer, task, expert] is gate mass: each token of the task adds the gates of its experts, which sum to 1.
With one expert per token that is the number of tokens that chose it; with more it is what they make of it,
and for a dense gate, where every token chooses every expert, it is the only thing that says anything.

    task information   I(T; E) / log min(T, E) with every task counting alike, so that the mixture's shares do
                       not enter: 0 where all tasks are routed alike, 1 where each has an expert of its own
    effective experts  exp(H(E)) over all tokens; balance is its share of all experts
    dead expert        less than a twentieth of its even share
    collapsed layer    fewer than 1.5 effective experts, or the same top-k experts for all but 1 % of the
                       mass: where fewer than all are chosen that is no choice any more

Expert numbers of two layers have nothing to do with each other, so shares are never averaged over layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Alarm = tuple[str, str]
"""Title and text."""
_DEAD = 1 / 20
_COLLAPSED_EXPERTS = 1.5
_COLLAPSED_MASS = 0.99
_CHOICES_EACH = 200
"""Choices per expert without which none is called dead. A fair router chooses an expert 200 times on average
then, and 10 times or fewer with a probability below 1e-60; tokens of one text are alike, hence so many."""
_NAMED = 3


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Routing of one step.

    Args:
        counts_LTE: Gate mass of each task's tokens on each expert, padding excluded, over all ranks.
        tasks: T names.
        layers: L names, those of the adapted modules.
        top_k: Experts of each token, or of each task; all of a layer that has fewer.
        per_task: Whether a task chooses for all its tokens.
        experts: Of each layer, where they differ; the rest of a layer's counts are zeros then.
    """

    counts_LTE: np.ndarray
    tasks: Sequence[str]
    layers: Sequence[str]
    top_k: int = 1
    per_task: bool = False
    experts: Sequence[int] = ()

    @cached_property
    def experts_L(self) -> np.ndarray:
        """Experts of each layer."""
        alike = [self.counts_LTE.shape[-1]] * len(self.layers)
        return np.array(self.experts or alike, dtype=np.int64)

    @cached_property
    def present(self) -> np.ndarray:
        """Tasks that have tokens, bool, shape (T,)."""
        return np.asarray(self.counts_LTE.sum(axis=(0, 2)) > 0)

    @cached_property
    def usage_LTE(self) -> np.ndarray:
        """p(expert | task): rows sum to 1; NaN for absent tasks."""
        totals = self.counts_LTE.sum(-1, keepdims=True)
        return np.divide(
            self.counts_LTE, totals, out=np.full(self.counts_LTE.shape, np.nan), where=totals > 0
        )

    @cached_property
    def load_LE(self) -> np.ndarray:
        """Share of each layer's mass that each expert has; zeros where a layer had no token."""
        mass_LE = self.counts_LTE.sum(1)
        return np.asarray(mass_LE / np.maximum(mass_LE.sum(-1, keepdims=True), 1))

    @cached_property
    def task_information_L(self) -> np.ndarray:
        """I(T; E) / log min(T, E), in [0, 1]; NaN with fewer than two tasks or experts.

        With n_t tokens on K_t experts a task's entropy reads (K_t - 1) / (2 n_t) too low, and that of the
        mean over tasks a little, so that information reads too high (Miller 1955; delta method). That much
        is taken off, as if tokens were independent draws of one expert: more than enough for gates of
        several experts, not enough for tokens of very few texts.
        """
        tasks = int(self.present.sum())
        fewest_L = np.minimum(tasks, self.experts_L)
        if tasks < 2 or (fewest_L < 2).any():
            return np.full(len(self.layers), np.nan)
        usage_LTE = np.nan_to_num(self.usage_LTE[:, self.present])
        tokens_LT = np.maximum(self.counts_LTE[:, self.present].sum(-1), 1)
        mean_LE = usage_LTE.mean(1)
        information_L = _entropy(mean_LE) - _entropy(usage_LTE).mean(1)
        spread_LTE = usage_LTE * (1 - usage_LTE) / tokens_LT[..., None]
        of_tasks_L = (((usage_LTE > 0).sum(-1) - 1) / tokens_LT).mean(1) / 2
        of_mean_L = (spread_LTE.sum(1) / np.where(mean_LE > 0, mean_LE, 1)).sum(-1) / tasks**2 / 2
        corrected_L = information_L - of_tasks_L + of_mean_L
        return np.asarray(np.clip(corrected_L / np.log(fewest_L), 0, 1))

    @cached_property
    def effective_experts_L(self) -> np.ndarray:
        """exp(H(E)) over all tokens, from 1 to E."""
        return np.asarray(np.exp(_entropy(self.load_LE)))

    @cached_property
    def balance_L(self) -> np.ndarray:
        """Effective experts over experts, from 1 / E to 1."""
        return np.asarray(self.effective_experts_L / self.experts_L)

    @cached_property
    def entropy_LT(self) -> np.ndarray:
        """H(E | task), nats; NaN for absent tasks."""
        return _entropy(self.usage_LTE)

    @cached_property
    def dead_LE(self) -> np.ndarray:
        """Experts with too small a share, bool; none where too few choices were made to tell."""
        experts_L1 = self.experts_L[:, None]
        exists_LE = np.arange(self.counts_LTE.shape[-1]) < experts_L1
        choices_L = self._choosers_L * np.minimum(self.top_k, self.experts_L)
        enough_L = choices_L >= _CHOICES_EACH * self.experts_L
        return np.asarray((self.load_LE * experts_L1 < _DEAD) & exists_LE & enough_L[:, None])

    @cached_property
    def collapsed_L(self) -> np.ndarray:
        """Layers without a choice, bool."""
        one_L = self.effective_experts_L < _COLLAPSED_EXPERTS
        same_L = np.sort(self.load_LE, -1)[:, -self.top_k :].sum(-1) > _COLLAPSED_MASS
        chosen_L = self.top_k < self.experts_L  # a dense gate always has all mass on its top-k
        enough_L = self._choosers_L >= (2 if self.per_task else _CHOICES_EACH)
        return np.asarray((one_L | (same_L & chosen_L)) & enough_L & (self.experts_L > 1))

    def top_experts(self, layer: int, task: int, count: int = 3) -> list[tuple[int, float]]:
        """A task's most used experts in a layer with their shares; none for an absent task."""
        usage_E = self.usage_LTE[layer, task]
        order = np.argsort(-usage_E, kind="stable")[:count]
        return [(int(e), float(usage_E[e])) for e in order if usage_E[e] > 0]

    def overlap_TT(self) -> np.ndarray:
        """Cosine of the tasks' usage of all layers' experts, in [0, 1]; NaN for absent tasks."""
        usage_TX = self.usage_LTE.swapaxes(0, 1).reshape(len(self.tasks), -1)
        unit_TX = usage_TX / np.linalg.norm(usage_TX, axis=1, keepdims=True)
        return np.asarray(np.clip(unit_TX @ unit_TX.T, 0, 1))

    def values(self) -> dict[str, float]:
        """Series `router/*`, means over layers; empty without routed layers or tokens."""
        if not self.counts_LTE.sum():
            return {}
        values = {
            "router/effective_experts": float(self.effective_experts_L.mean()),
            "router/balance": float(self.balance_L.mean()),
            "router/dead_experts": float(self.dead_LE.sum()),
            "router/collapsed_layers": float(self.collapsed_L.sum()),
        }
        if np.isfinite(self.task_information_L).all():
            values["router/task_information"] = float(self.task_information_L.mean())
        return values

    def alarms(self) -> list[Alarm]:
        """What is wrong in this step alone; `RoutingWatch` waits until it lasts."""
        collapsed = {self.layers[i] for i in np.flatnonzero(self.collapsed_L).tolist()}
        dead = {(self.layers[i], e) for i, e in np.argwhere(self.dead_LE).tolist()}
        return _alarms(self, collapsed, dead)

    def most_telling_layer(self) -> int:
        """The layer with the most task information."""
        return int(np.argmax(np.nan_to_num(self.task_information_L)))

    def task_expert(self, layer: int | None = None) -> list[tuple[str, str, float]]:
        """(task, expert, share) for a heat map of one layer, by default the most telling one."""
        if not len(self.layers):
            return []
        layer = self.most_telling_layer() if layer is None else layer
        across = [f"{self.layers[layer]}: {e}" for e in range(self.experts_L[layer])]
        return [
            (self.tasks[t], name, float(share))
            for t in np.flatnonzero(self.present).tolist()
            for name, share in zip(across, self.usage_LTE[layer, t], strict=False)
        ]

    def to_json(self, step: int) -> dict[str, Any]:
        """What `routing/step-N.json` holds."""
        rounded = np.round(self.counts_LTE, 3)
        whole = (rounded == np.round(rounded)).all()
        return {
            "step": step,
            "tasks": list(self.tasks),
            "layers": list(self.layers),
            "top_k": self.top_k,
            "per_task": self.per_task,
            "experts": self.experts_L.tolist(),
            "counts_LTE": (rounded.astype(np.int64) if whole else rounded).tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RoutingStats:
        """What `to_json` gave."""
        counts = np.array(data["counts_LTE"], dtype=np.float64)
        how = (int(data.get("top_k", 1)), bool(data.get("per_task", False)), tuple(data.get("experts", ())))
        return cls(counts, tuple(data["tasks"]), tuple(data["layers"]), *how)

    @property
    def _choosers_L(self) -> np.ndarray:
        """How many have chosen in each layer: tokens, or tasks."""
        if self.per_task:
            return np.full(len(self.layers), self.present.sum())
        return np.asarray(self.counts_LTE.sum(axis=(1, 2)))


class RoutingWatch:
    """Raises an alarm when something has been wrong for several looks in a row, and once until it is well.

    Args:
        looks: So many.
    """

    def __init__(self, looks: int = 3) -> None:
        self._looks = looks
        self._runs: dict[object, int] = {}

    def look(self, stats: RoutingStats) -> list[Alarm]:
        """Alarms that are new with this step's routing."""
        wrong: list[object] = [stats.layers[i] for i in np.flatnonzero(stats.collapsed_L).tolist()]
        wrong += [(stats.layers[i], e) for i, e in np.argwhere(stats.dead_LE).tolist()]
        self._runs = {what: self._runs.get(what, 0) + 1 for what in wrong}
        new = [what for what, run in self._runs.items() if run == self._looks]
        collapsed = {what for what in new if isinstance(what, str)}
        return _alarms(stats, collapsed, {what for what in new if isinstance(what, tuple)})


def _alarms(stats: RoutingStats, collapsed: set[str], dead: set[tuple[str, int]]) -> list[Alarm]:
    alarms = []
    if collapsed:
        of_layers = zip(stats.layers, stats.effective_experts_L, stats.experts_L.tolist(), strict=True)
        layers = [of for of in of_layers if of[0] in collapsed]
        named = _first([f"{name} uses {used:.1f} of {experts} experts" for name, used, experts in layers])
        alarms.append(("router collapse", f"{len(layers)} of {len(stats.layers)} layers: {named}"))
    if dead:
        named = _first([f"expert {e} of {layer}" for layer, e in sorted(dead)])
        alarms.append(("dead experts", f"{len(dead)} of {stats.experts_L.sum()}: {named}"))
    return alarms


def _first(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Nats, over the last axis; 0 log 0 is 0."""
    logs = np.log(np.where(shares > 0, shares, 1))
    return np.asarray(-(shares * logs).sum(-1))
