"""PEFT's LoRA, Poly and X-LoRA, through its own `get_peft_model`."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from adapters_case import SCALING, TARGETS, TASKS, Arm, Case, Kind, plain_logits
from torch import nn


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


def _kind(name: str, build: Any, gate: str, **more: Any) -> Kind:
    return Kind(name, build, "peft", gate, package="peft", **more)


KINDS = (
    _kind("PEFT LoRA k*r", partial(lora_arm, share="k*r"), "none"),
    _kind("PEFT LoRA E*r", partial(lora_arm, share="E*r"), "none", lead=True),
    _kind(
        "PEFT LoRA E*r, dropout",
        partial(lora_arm, share="E*r", dropout=0.05),
        "none",
        dropout=0.05,
        lead=True,
    ),
    _kind(
        "PEFT Poly",
        poly_arm,
        "task, all",
        note="per row; multiplies the mean of the A by the mean of the B, where a mixture sums products",
    ),
    _kind(
        "PEFT X-LoRA",
        xlora_arm,
        "token, top-k",
        costly=True,
        note="a second, adapter-free pass makes the gates of all layers; experts trainable",
    ),
)
