"""The published systems from their equations, token by token and expert by expert: what ours must equal.

Nothing here is of the package. A reference is a base model whose linear layers, or FFN blocks, are replaced
by small modules; they take the adapters' tensors by name and autograd finds the gradients. Gates are made for
one token at a time, as in the papers. Dropout, jitter and sampling are left out: they act in training only.
Written for clarity, and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
"""Of one adapted module, by their names in it."""


@dataclass
class Side:
    """What a gate may look at beside its input: of every token, (B, S) unless said otherwise."""

    tasks: Tensor | None = None
    samples: Tensor | None = None
    """Number of the token's sample."""
    prompt: Tensor | None = None
    """True on the tokens by which a sample is routed."""
    hidden: Tensor | None = None
    """(B, S, D): the last hidden state of a first pass without adapters."""
    decisions: dict[str, Tensor] = field(default_factory=dict)
    """Scope -> (B, S, E): what the first module of the scope has decided in this pass."""


Gate = Callable[[Tensor, Side], Tensor]
"""(B, S, D) -> (B, S, E), 0 where an expert is not used."""


# Gates


def choose(logits: Tensor, top_k: int, renormalise: bool = True, temperature: float = 1.0) -> Tensor:
    """One token: p = softmax(z / temperature); the k largest p, divided by their sum or as they are.

    `top_k` 0 takes all.
    """
    shares = (logits / temperature).softmax(0)
    chosen = sorted(range(len(shares)), key=lambda i: -shares[i].item())[: top_k or len(shares)]
    total = sum(shares[i] for i in chosen) if renormalise else torch.ones(())
    gates = [shares[i] / total if i in chosen else torch.zeros(()) for i in range(len(shares))]
    return torch.stack(gates)


def token_gate(of: Tensors, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """MING-MOE, MixLoRA, MoLA, LoRAMoE, HydraLoRA: z = W x + b of each token."""
    return lambda x, side: _each(x, lambda token, b, s: choose_from(_linear(of, token)))


def task_gate(of: Tensors, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """MOELoRA: z = W_T e_j of the token's task j; without a task the mean of all tasks' logits."""
    return lambda x, side: _each(x, lambda token, b, s: choose_from(_task_logits(of, side, b, s)))


def joint_gate(of: Tensors, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """z = W x + b + W_T e_j."""

    def gate(token: Tensor, side: Side, b: int, s: int) -> Tensor:
        return choose_from(_linear(of, token) + _task_logits(of, side, b, s, "task_weight"))

    return lambda x, side: _each(x, lambda token, b, s: gate(token, side, b, s))


def sequence_gate(of: Tensors, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """z = W m + b, m the mean over the prompt of the token's sample, whose tokens all have one gate."""

    def gate(x: Tensor, side: Side) -> Tensor:
        assert side.samples is not None
        assert side.prompt is not None
        means = {int(n): x[(side.samples == n) & side.prompt].mean(0) for n in side.samples.unique()}
        gates = {n: choose_from(_linear(of, mean)) for n, mean in means.items()}
        samples = side.samples
        return _each(x, lambda token, b, s: gates[int(samples[b, s])])

    return gate


def threshold_gate(of: Tensors) -> Gate:
    """AdaMoLE: p = softmax(W x); tau = sigmoid(w x + b) / E; g_i = (p_i - tau)_+ / sum_j (p_j - tau)_+."""

    def gate(token: Tensor) -> Tensor:
        shares = _linear(of, token).softmax(0)
        tau = torch.sigmoid(of["threshold_weight"] @ token + of["threshold_bias"]).reshape(()) / len(shares)
        above = [p - tau if p >= tau else torch.zeros(()) for p in shares]
        return torch.stack([a / sum(above) for a in above])

    return lambda x, side: _each(x, lambda token, b, s: gate(token))


def hierarchical_gate(of: Tensors, groups: int, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """log p_i = log softmax(outer)_g(i) + log softmax(inner within the group)_i; groups are neighbours."""

    def gate(token: Tensor) -> Tensor:
        inner = _linear(of, token)
        outer = _linear(of, token, "group_").log_softmax(0)
        size = len(inner) // groups
        parts = [outer[g] + inner[g * size : (g + 1) * size].log_softmax(0) for g in range(groups)]
        return choose_from(torch.cat(parts))

    return lambda x, side: _each(x, lambda token, b, s: gate(token))


def hidden_gate(of: Tensors, choose_from: Callable[[Tensor], Tensor]) -> Gate:
    """X-LoRA: s = softmax(W h + b), h the last hidden state of the token in a pass without adapters."""

    def gate(x: Tensor, side: Side) -> Tensor:
        assert side.hidden is not None
        hidden = side.hidden
        return _each(x, lambda token, b, s: choose_from(_linear(of, hidden[b, s])))

    return gate


def once(scope: str, gate: Gate) -> Gate:
    """The gate of the scope's first module, for all modules of the scope."""

    def shared(x: Tensor, side: Side) -> Tensor:
        if scope not in side.decisions:
            side.decisions[scope] = gate(x, side)
        return side.decisions[scope]

    return shared


def _each(x: Tensor, gate: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    rows = [[gate(token, b, s) for s, token in enumerate(row)] for b, row in enumerate(x)]
    return torch.stack([torch.stack(row) for row in rows])


def _linear(of: Tensors, token: Tensor, kind: str = "") -> Tensor:
    logits = of[f"{kind}weight"] @ token
    return logits + of[f"{kind}bias"] if f"{kind}bias" in of else logits


def _task_logits(of: Tensors, side: Side, b: int, s: int, weight: str = "weight") -> Tensor:
    logits = [of[weight] @ e for e in of["embedding"]]
    return torch.stack(logits).mean(0) if side.tasks is None else logits[int(side.tasks[b, s])]


# Adapted modules


class _Adapted(nn.Module):
    """A base module, the tensors of its adapter, and the pass's side inputs."""

    def __init__(self, base: nn.Module, of: Tensors, scaling: float, side: Side) -> None:
        super().__init__()
        self.base, self.of, self.scaling, self.side = base, dict(of), scaling, side


class Plain(_Adapted):
    """LoRA: y = W0 x + s B A x."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.of["lora_A"].T @ self.of["lora_B"].T)


class Dora(_Adapted):
    """DoRA: y = m * (W0 + s B A) x / |W0 + s B A|, norms over rows and not differentiated; b as it is."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scaling * self.of["lora_B"] @ self.of["lora_A"]
        norm = torch.stack([row.norm() for row in weight]).detach()
        y = x @ ((self.of["magnitude"] / norm)[:, None] * weight).T
        return y if self.base.bias is None else y + self.base.bias


class Experts(_Adapted):
    """y = W0 x + s (sum_i g_i B_i A_i x + w sum_j B'_j A'_j x), j over the shared experts.

    A may be one for all experts (HydraLoRA). The shared experts' weight is `shared_gate` where it is learned.
    """

    def __init__(
        self, base: nn.Module, of: Tensors, scaling: float, side: Side, gate: Gate, weight: float = 1.0
    ) -> None:
        super().__init__(base, of, scaling, side)
        self.gate, self.weight = gate, weight

    def forward(self, x: Tensor) -> Tensor:
        y, gates = self.base(x), self.gate(x, self.side)
        for i, B in enumerate(self.of["lora_B"]):
            A = self.of["lora_A"] if self.of["lora_A"].dim() == 2 else self.of["lora_A"][i]
            y = y + self.scaling * gates[..., i, None] * (x @ A.T @ B.T)
        for j in range(len(self.of.get("shared_B", ()))):
            weight = self.of["shared_gate"][j] if "shared_gate" in self.of else self.weight
            y = y + self.scaling * weight * (x @ self.of["shared_A"][j].T @ self.of["shared_B"][j].T)
        return y


class FusedBlock(_Adapted):
    """MixLoRA: y = sum_i g_i FFN_i(x); FFN_i is the frozen block with LoRA i on each of its linears."""

    def __init__(
        self, base: nn.Module, of: Mapping[str, Tensors], scaling: float, side: Side, gate: Gate
    ) -> None:
        super().__init__(base, {}, scaling, side)
        self.linears, self.gate = of, gate

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x, self.side)
        return sum(gates[..., i, None] * self._ffn(i, x) for i in range(gates.shape[-1]))

    def _ffn(self, i: int, x: Tensor) -> Tensor:
        block = self.base
        act = block.act_fn(self._linear("gate_proj", i, x))
        return self._linear("down_proj", i, act * self._linear("up_proj", i, x))

    def _linear(self, name: str, i: int, x: Tensor) -> Tensor:
        A, B = self.linears[name]["lora_A"][i], self.linears[name]["lora_B"][i]
        return getattr(self.base, name)(x) + self.scaling * (x @ A.T @ B.T)


class FullBlock(_Adapted):
    """Med-MoE: full copies of an FFN block, E_i and the meta experts M_j, of which it has one with w = 1.

    As published: y = sum_i g_i E_i(x) + sum_j w_j M_j(x), which is (1 + p) FFN(x) at the start. `preserving`
    divides it by sum_i g_i + sum_j w_j, so that copies of one FFN are that FFN.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: Sequence[Tensors],
        metas: Sequence[Tensors],
        side: Side,
        gate: Gate,
        weights: Tensor,
        preserving: bool = True,
    ) -> None:
        super().__init__(base, {}, 1.0, side)
        self.experts, self.metas, self.gate = experts, metas, gate
        self.weights, self.preserving = weights, preserving

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x, self.side)
        y = sum(gates[..., i, None] * self._ffn(of, x) for i, of in enumerate(self.experts))
        y = y + sum(w * self._ffn(of, x) for w, of in zip(self.weights, self.metas, strict=True))
        total = gates.sum(-1, keepdim=True) + self.weights.sum()
        return y / total if self.preserving else y

    def _ffn(self, of: Tensors, x: Tensor) -> Tensor:
        act = self.base.act_fn(x @ of["gate_proj"].T)
        return (act * (x @ of["up_proj"].T)) @ of["down_proj"].T


# Models


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Replace modules by full name."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


def tensors_of(state: Tensors, module: str) -> dict[str, Tensor]:
    """Those of one module, without its name; those of modules in it keep the rest of theirs."""
    start = f"{module}."
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}


def leaves_of(named: Tensors) -> dict[str, Tensor]:
    """Copies that gradients can be taken with respect to."""
    return {name: value.detach().clone().requires_grad_() for name, value in named.items()}
