"""Plain references, from the equations, of how two published systems compute their experts in training.

MING-MOE (arXiv 2404.09027): every expert computes all tokens; the outputs are stacked (E, T, F), those of the
chosen experts gathered, and summed with their gates. MOELoRA (arXiv 2310.18339): a loop over experts of rank
r / E, each output multiplied by the row's gate for it. No code of either was copied.
"""

from __future__ import annotations

from typing import Any

import torch
from adapters_case import SCALING, TASKS, Arm, Case, Kind, Numbers, plain_logits, set_module
from adapters_ours import TASK, TOKEN, ours, task_settings
from torch import Tensor, nn
from torch.nn import functional


class Expert(nn.Module):
    """B A x, as two linears."""

    def __init__(self, A_rD: Tensor, B_Fr: Tensor):
        super().__init__()
        self.A, self.B = nn.Parameter(A_rD.clone()), nn.Parameter(B_Fr.clone())

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.A), self.B)


def experts_of(numbers: Numbers, device: torch.device) -> nn.ModuleList:
    pairs = zip(numbers.A_ErD, numbers.B_EFr, strict=True)
    return nn.ModuleList(Expert(a, b) for a, b in pairs).to(device)


class MingLinear(nn.Module):
    """y = W x + scaling * sum_{i in top-k} g_i (B_i A_i x), all B_i A_i x made first."""

    def __init__(self, base: nn.Module, numbers: Numbers, top_k: int, device: torch.device):
        super().__init__()
        self.base, self.top_k = base, top_k
        self.experts = experts_of(numbers, device)
        self.router = nn.Linear(*reversed(numbers.router_ED.shape), device=device)
        with torch.no_grad():
            self.router.weight.copy_(numbers.router_ED)
            self.router.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        gates_TE = self.router(x_TD).softmax(-1)
        gates_TK, ids_TK = gates_TE.topk(self.top_k, dim=-1)
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
        outputs_ETF = torch.stack([expert(x_TD) for expert in self.experts])
        chosen_KTF = outputs_ETF.gather(0, ids_TK.t()[..., None].expand(-1, -1, outputs_ETF.shape[-1]))
        delta_TF = torch.einsum("tk,ktf->tf", gates_TK.to(chosen_KTF.dtype), chosen_KTF)
        y: Tensor = self.base(x)
        return y + SCALING * delta_TF.reshape(y.shape)


class TaskGate(nn.Module):
    """softmax(W e_j), made once per forward for the whole model."""

    def __init__(self, embedding: Tensor, weight: Tensor):
        super().__init__()
        self.embedding, self.weight = nn.Parameter(embedding.clone()), nn.Parameter(weight.clone())
        self.gates_BE = torch.empty(0)

    def forward(self, tasks_B: Tensor) -> None:
        self.gates_BE = functional.linear(self.embedding[tasks_B], self.weight).softmax(-1)


class MoeLoraLinear(nn.Module):
    """y = W x + scaling * sum_i gate_i (B_i A_i x), one expert after the other."""

    def __init__(self, base: nn.Module, numbers: Numbers, gate: TaskGate, device: torch.device):
        super().__init__()
        self.base, self.gate = base, [gate]  # in a list: it is the model's, not each layer's
        self.experts = experts_of(numbers, device)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        gates_BE = self.gate[0].gates_BE
        for i, expert in enumerate(self.experts):
            y = y + SCALING * gates_BE[:, i, None, None] * expert(x)
        return y


def ming_arm(case: Case) -> Arm:
    model = case.model()
    for name in case.linears:
        base = model.get_submodule(name)
        set_module(model, name, MingLinear(base, case.numbers(name), case.shape.top_k, case.device))
    return Arm(model, lambda: plain_logits(model, case), trainable(model))


def moelora_arm(case: Case) -> Arm:
    model = case.model()
    router = next(m for m in ours(case, task_settings(case)).model.modules() if hasattr(m, "gate_of"))
    gate = TaskGate(router.embedding.detach(), router.weight.detach()).to(case.device)
    for name in case.linears:
        base = model.get_submodule(name)
        set_module(model, name, MoeLoraLinear(base, case.numbers(name), gate, case.device))

    def logits() -> Tensor:
        gate(case.tasks_B)
        return plain_logits(model, case)

    return Arm(model.train(), logits, [*trainable(model), *gate.parameters()])


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.train().parameters() if parameter.requires_grad]


def _kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "form", gate, costly=True, **more)


KINDS = (
    _kind("MING's form", ming_arm, "token, top-k", same_as=TOKEN, lead=True),
    _kind("MOELoRA's form", moelora_arm, f"task of {TASKS}, all", same_as=TASK),
)
