"""The frozen base alone, and the arms of `moe_medical`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from adapters_case import SCALING, SEED, TASKS, Arm, Case, Kind, plain_logits
from torch import Tensor, nn

from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.config.presets import FFN, MoloraConfig

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


def _kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "ours", gate, **more)


KINDS = (
    Kind(BASE, base_alone, "base", "none", lead=True, note="backward to the embeddings' output"),
    Kind(FLOOR, base_as_far, "base", "none", lead=True, note="backward to the first adapted outputs"),
    _kind(TOKEN, token_arm, "token, top-k", lead=True, note="path auto"),
    _kind(f"{TOKEN}, concat", partial(token_arm, path="concat"), "token, top-k", same_as=TOKEN),
    _kind(f"{TOKEN}, grouped", partial(token_arm, path="grouped"), "token, top-k", same_as=TOKEN),
    _kind(
        f"{TOKEN}, dropout",
        partial(token_arm, dropout=0.05),
        "token, top-k",
        dropout=0.05,
        same_as=TOKEN,
        lead=True,
        note="path auto; outputs compared without dropout",
    ),
    _kind(TASK, lambda case: ours(case, task_settings(case)), "task, all", lead=True),
    _kind("ours joint", joint_arm, "token and task, top-k"),
    _kind(
        BLOCK,
        lambda case: ours(case, block_settings(case)),
        "token, top-k",
        note="preset mixlora: experts of the whole FFN block",
    ),
)
