"""Routed LoRA trained on one process in plain PyTorch, from the equations: what every layout must reproduce.

Nothing here is of the package: adapters are applied expert by expert, each row runs alone (so there is no
padding to leave out), the whole global batch is one graph, and autograd finds all gradients, those of the
router losses too. Written for clarity, and slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True)
class Row:
    """One sample: the loss is on `tokens[num_prompt:]`."""

    tokens: list[int]
    num_prompt: int
    task: int
    group: int = 0
    """The balance loss takes the experts' shares over the rows of a group."""

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - self.num_prompt


def task_token_mean(rows: Sequence[Row]) -> list[float]:
    """(rows of the task / rows) * mean over its target tokens, as the weight of a token of each row."""
    tokens, count = Counter[int](), Counter(row.task for row in rows)
    for row in rows:
        tokens[row.task] += row.num_targets
    return [count[row.task] / len(rows) / tokens[row.task] for row in rows]


@dataclass(frozen=True)
class Rules:
    """How the reference trains; `rates` has one learning rate for each step."""

    top_k: int
    scaling: float
    rates: Sequence[float]
    clip: float
    balance: float = 0.0
    z: float = 0.0
    weight_decay: float = 0.0
    epsilon: float = 1e-8
    token_weights: Callable[[Sequence[Row]], Sequence[float]] = task_token_mean
    """Weight of each row's target tokens in the loss of a global batch."""


@dataclass(frozen=True)
class Trained:
    """What came out: by step the values, and the adapters after the last one."""

    loss: list[float]
    balance: list[float]
    z: list[float]
    norm: list[float]
    """Of the gradient, before clipping."""
    tensors: dict[str, Tensor]


def train(base: Path, start: Mapping[str, Tensor], steps: Sequence[Sequence[Row]], rules: Rules) -> Trained:
    """Train adapters.

    Args:
        base: Model folder.
        start: The adapters' first tensors by full parameter name; they say which layers have which adapter.
        steps: The global batch of each step.
        rules: How.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    adapted = _adapt(model, start, rules)
    named = {f"{n}.{key}": p for n, layer in adapted.items() for key, p in layer.named.items()}
    optimizer = torch.optim.AdamW(
        list(named.values()), lr=1.0, eps=rules.epsilon, weight_decay=rules.weight_decay
    )
    seen: list[tuple[float, ...]] = []
    for rows, rate in zip(steps, rules.rates, strict=True):
        loss = _loss(model, rows, rules.token_weights(rows))
        routed = [layer for layer in adapted.values() if isinstance(layer, _Routed)]
        balance, z = _router_losses(routed, [row.group for row in rows])
        optimizer.zero_grad()
        (loss + rules.balance * balance + rules.z * z).backward()
        norm = torch.nn.utils.clip_grad_norm_(list(named.values()), rules.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        seen.append((loss.item(), balance.item(), z.item(), norm.item()))
    loss_of, balance_of, z_of, norm_of = (list(column) for column in zip(*seen, strict=True))
    tensors = {name: p.detach().clone() for name, p in named.items()}
    return Trained(loss_of, balance_of, z_of, norm_of, tensors)


class _Plain(nn.Module):
    """y = base(x) + scaling * B A x."""

    def __init__(self, base: nn.Module, tensors: Mapping[str, Tensor], rules: Rules) -> None:
        super().__init__()
        self.base, self.rules = base, rules
        self.named = {key: nn.Parameter(value.clone()) for key, value in tensors.items()}

    def forward(self, x: Tensor) -> Tensor:
        delta: Tensor = x @ self.named["lora_A"].T @ self.named["lora_B"].T
        return self.base(x) + self.rules.scaling * delta


class _Routed(_Plain):
    """y = base(x) + scaling * sum over the chosen experts of g_i B_i A_i x; keeps all tokens' logits."""

    def __init__(self, base: nn.Module, tensors: Mapping[str, Tensor], rules: Rules) -> None:
        super().__init__(base, tensors, rules)
        self.logits: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.named["router.weight"].T + self.named["router.bias"]
        self.logits.append(logits.flatten(0, -2))
        gates = logits.masked_fill(~_chosen(logits, self.rules.top_k), float("-inf")).softmax(-1)
        y: Tensor = self.base(x)
        for i, (A, B) in enumerate(zip(self.named["lora_A"], self.named["lora_B"], strict=True)):
            y = y + self.rules.scaling * gates[..., i, None] * (x @ A.T @ B.T)
        return y

    def take_logits(self) -> list[Tensor]:
        """(tokens, experts) of each row since the last call."""
        taken, self.logits = self.logits, []
        return taken


def _chosen(logits: Tensor, top_k: int) -> Tensor:
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter(-1, logits.topk(top_k).indices, True)


def _adapt(model: PreTrainedModel, start: Mapping[str, Tensor], rules: Rules) -> dict[str, _Plain]:
    """Replace the linear layers that `start` names."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, value in start.items():
        parts = name.split(".")
        cut = -2 if parts[-2] == "router" else -1
        tensors.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = value
    adapted: dict[str, _Plain] = {}
    for name, of_layer in tensors.items():
        kind = _Routed if "router.weight" in of_layer else _Plain
        adapted[name] = kind(model.get_submodule(name), of_layer, rules)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[name])
    return adapted


def _loss(model: PreTrainedModel, rows: Sequence[Row], weights: Sequence[float]) -> Tensor:
    """sum over rows of weight * sum over the row's target tokens."""
    parts = []
    for row, weight in zip(rows, weights, strict=True):
        logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0]
        losses = F.cross_entropy(logits[:-1], torch.tensor(row.tokens[1:]), reduction="none")
        parts.append(weight * losses[row.num_prompt - 1 :].sum())
    return torch.stack(parts).sum()


def _router_losses(layers: Sequence[_Routed], groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Balance (E * sum_i f_i P_i) and z-loss (mean logsumexp^2) over all tokens, averaged over layers."""
    balance, z = [], []
    for layer in layers:
        rows = layer.take_logits()
        logits = torch.cat(rows)
        shares = {group: _shares(layer, rows, groups, group) for group in set(groups)}
        share = torch.cat([shares[g].expand(len(r), -1) for r, g in zip(rows, groups, strict=True)])
        balance.append(logits.shape[-1] * (share * logits.softmax(-1)).sum(-1).mean())
        z.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balance).mean(), torch.stack(z).mean()


def _shares(layer: _Routed, rows: Sequence[Tensor], groups: Sequence[int], group: int) -> Tensor:
    """(experts,): the share of a group's tokens that chose each expert."""
    logits = torch.cat([row for row, of_row in zip(rows, groups, strict=True) if of_row == group])
    return _chosen(logits, layer.rules.top_k).float().mean(0)
