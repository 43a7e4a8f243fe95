"""Arms that need no other package than PEFT: the frozen base, ours, PEFT's, forms from published equations.

MING-MOE (arXiv 2404.09027): every expert computes all tokens; the outputs are stacked (E, T, F), those of the
chosen experts gathered, and summed with their gates. MOELoRA (arXiv 2310.18339): a loop over experts of rank
r / E, each output multiplied by the row's gate for it. No code of either was copied.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from adapters_common import SCALING, SEED, TARGETS, TASKS, Arm, Case, Kind, Numbers, plain_logits, set_module
from torch import Tensor, nn
from torch.nn import functional

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.config.adapters import FFN, MoloraConfig

BASE, FLOOR = "base", "base, backward as of adapters"
TOKEN, TASK, BLOCK = "ours token", "ours task", "ours block"


def base_alone(case: Case) -> Arm:
    """Backward goes on to the embeddings' output, a little further than that of adapters."""
    model = case.model()
    embedded_BSD = model.get_input_embeddings()(case.ids_BS).detach().requires_grad_()
    logits = lambda: model(inputs_embeds=embedded_BSD, use_cache=False).logits  # noqa: E731
    return Arm(model, logits, [], leaves=[embedded_BSD])


def base_as_far(case: Case) -> Arm:
    """Backward ends where the first adapters' gradients begin: what all arms with adapters have to do."""
    model = case.model()
    for name in case.linears:
        model.get_submodule(name).register_forward_hook(_begin_gradient)
    return Arm(model, lambda: plain_logits(model, case), [])


def _begin_gradient(_: nn.Module, __: Any, y: Tensor) -> Tensor:
    return y if y.requires_grad else y.detach().requires_grad_()


def settings(case: Case, dropout: float = 0.0, **more: Any) -> MoloraConfig:
    """Token-routed experts on each linear of the FFN, with `more` on top."""
    shape = case.shape
    chosen: dict[str, Any] = {
        "num_experts": shape.experts,
        "top_k": shape.top_k,
        "rank": shape.rank,
        "molora": (FFN,),
        "lora": (),
        "dropout": dropout,
    }
    chosen |= more
    return MoloraConfig(alpha=SCALING * chosen["rank"], **chosen)


def task_settings(case: Case, dropout: float = 0.0) -> MoloraConfig:
    """MOELoRA's: one gate for the model, all experts, the rank split between them."""
    split = {"rank": case.shape.total_rank, "rank_split": True, "top_k": 0, "num_tasks": TASKS}
    return settings(case, dropout, router="task", router_scope="model", **split)


def block_settings(case: Case) -> MoloraConfig:
    return settings(case, preset="mixlora", experts="block", router_scope="block", router_bias=False)


def ours(case: Case, config: MoloraConfig) -> Arm:
    model, context = attach(case, config)
    around = partial(bind, context, case)
    return Arm(model, lambda: plain_logits(model, case), list(adapter_parameters(model).values()), around)


def attach(case: Case, config: MoloraConfig) -> tuple[nn.Module, RoutingContext]:
    """A model with the case's numbers in its adapters."""
    model = case.model()
    context = attach_adapters(model, config, SEED)
    for name, parameter in adapter_parameters(model).items():
        give(case, name, parameter)
    return model.train(), context


@torch.no_grad()
def give(case: Case, name: str, parameter: nn.Parameter) -> None:
    """The case's numbers; what it has none for keeps its first values, a bias becomes 0."""
    owner, part = linear_of(case, name)
    if part == "lora_A":
        parameter.copy_(case.numbers(owner).A_ErD)
    elif part == "lora_B":
        parameter.copy_(case.numbers(owner).B_EFr)
    elif part == "router.bias":
        parameter.zero_()
    elif part == "router.weight" and parameter.shape[1] == case.linears[owner][0]:
        parameter.copy_(case.numbers(owner).router_ED)


def linear_of(case: Case, parameter: str) -> tuple[str, str]:
    """(linear, rest of the name); the router of a block has the numbers of the block's gate_proj."""
    plain = parameter.replace(".base.", ".").replace(".experts.", ".")
    for linear in case.linears:
        if plain.startswith(f"{linear}."):
            return linear, plain.removeprefix(f"{linear}.")
    block, _, rest = plain.partition(".router.")
    return f"{block}.gate_proj", f"router.{rest}"


def bind(context: RoutingContext, case: Case) -> AbstractContextManager[Any]:
    tasks_BS = case.tasks_B[:, None].expand(case.ids_BS.shape)
    return context.bind(BatchInputs(torch.ones_like(case.ids_BS, dtype=torch.bool), tasks_BS))


def token_arm(case: Case, dropout: float = 0.0, path: str = "auto") -> Arm:
    return ours(case, settings(case, dropout, path=path))


def joint_arm(case: Case) -> Arm:
    return ours(case, settings(case, router="joint", num_tasks=TASKS))


def _ours_kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "ours", gate, **more)


OURS_KINDS = (
    Kind(BASE, base_alone, "base", "none", lead=True, note="backward to the embeddings' output"),
    Kind(FLOOR, base_as_far, "base", "none", lead=True, note="backward to the first adapted outputs"),
    _ours_kind(TOKEN, token_arm, "token, top-k", lead=True, note="path auto"),
    _ours_kind(f"{TOKEN}, concat", partial(token_arm, path="concat"), "token, top-k", same_as=TOKEN),
    _ours_kind(f"{TOKEN}, grouped", partial(token_arm, path="grouped"), "token, top-k", same_as=TOKEN),
    _ours_kind(
        f"{TOKEN}, dropout",
        partial(token_arm, dropout=0.05),
        "token, top-k",
        dropout=0.05,
        same_as=TOKEN,
        lead=True,
        note="path auto; outputs compared without dropout",
    ),
    _ours_kind(TASK, lambda case: ours(case, task_settings(case)), "task, all", lead=True),
    _ours_kind("ours joint", joint_arm, "token and task, top-k"),
    _ours_kind(
        BLOCK,
        lambda case: ours(case, block_settings(case)),
        "token, top-k",
        note="preset mixlora: experts of the whole FFN block",
    ),
)

# PEFT's LoRA, Poly and X-LoRA, through its own `get_peft_model`


def lora_arm(case: Case, share: str, dropout: float = 0.0) -> Arm:
    """Rank `k*r` (a token's active experts) or `E*r` (all of them)."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(case.model(), lora_settings(LoraConfig, rank_of(case, share), dropout))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return of_peft(model.train(), case)


def rank_of(case: Case, share: str) -> int:
    return (case.shape.top_k if share == "k*r" else case.shape.experts) * case.shape.rank


def lora_settings(config: Any, rank: int, dropout: float = 0.0) -> Any:
    known = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    return config(r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout, **known)


def of_peft(model: nn.Module, case: Case, **more: Any) -> Arm:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Arm(model, lambda: plain_logits(model, case, **more), trainable)


def poly_arm(case: Case) -> Arm:
    from peft import PolyConfig, get_peft_model

    shape = case.shape
    known = {"target_modules": list(TARGETS), "task_type": "CAUSAL_LM"}
    config = PolyConfig(r=shape.rank, n_tasks=TASKS, n_skills=shape.experts, **known)
    model = get_peft_model(case.model(), config)
    for name, parameter in model.named_parameters():
        if "poly_lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return of_peft(model.train(), case, task_ids=case.tasks_B)


def xlora_arm(case: Case) -> Arm:
    """Trainable experts, top-k of them: what comes nearest to the other arms."""
    from peft import LoraConfig, XLoraConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        saved = get_peft_model(case.model(), lora_settings(LoraConfig, case.shape.rank))
        saved.save_pretrained(folder)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=case.base.config.hidden_size,
            adapters={str(i): folder for i in range(case.shape.experts)},
            top_k_lora=case.shape.top_k,
            layerwise_scalings=True,
            use_trainable_adapters=True,
        )
        model = get_peft_model(case.model(), config)
    return of_peft(model.train(), case)


def _peft_kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "peft", gate, package="peft", **more)


PEFT_KINDS = (
    _peft_kind("PEFT LoRA k*r", partial(lora_arm, share="k*r"), "none"),
    _peft_kind("PEFT LoRA E*r", partial(lora_arm, share="E*r"), "none", lead=True),
    _peft_kind(
        "PEFT LoRA E*r, dropout",
        partial(lora_arm, share="E*r", dropout=0.05),
        "none",
        dropout=0.05,
        lead=True,
    ),
    _peft_kind(
        "PEFT Poly",
        poly_arm,
        "task, all",
        note="per row; multiplies the mean of the A by the mean of the B, where a mixture sums products",
    ),
    _peft_kind(
        "PEFT X-LoRA",
        xlora_arm,
        "token, top-k",
        costly=True,
        note="a second, adapter-free pass makes the gates of all layers; experts trainable",
    ),
)

# Plain references


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


def _form_kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "form", gate, costly=True, **more)


FORM_KINDS = (
    _form_kind("MING's form", ming_arm, "token, top-k", same_as=TOKEN, lead=True),
    _form_kind("MOELoRA's form", moelora_arm, f"task of {TASKS}, all", same_as=TASK),
)
