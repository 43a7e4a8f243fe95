"""Routers that cannot learn are told, and no others: compared with the gradients of a step."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.one_process import gradients, one_step, tiny_engine, tiny_samples

from moe_medical.adapters.model import adapter_parameters
from moe_medical.config import MoloraConfig
from moe_medical.data.batches import collate
from moe_medical.training.router_losses import RouterLosses

COMMON = {"rank": 4, "dropout": 0.0, "lora": ()}
CASES = [
    {"num_experts": experts, "top_k": top_k, "renormalise": renormalise, loss: value}
    for experts, top_k, renormalise, (loss, value) in itertools.product(
        (1, 4),
        (0, 1, 2),
        (True, False),
        (("z_coefficient", 0.0), ("z_coefficient", 0.1), ("balance_coefficient", 0.1)),
    )
    if top_k <= experts
]


@pytest.mark.parametrize("settings", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_what_is_told_is_what_gets_no_gradient(settings: dict[str, object]) -> None:
    config = MoloraConfig(**COMMON, **settings)
    engine, context = tiny_engine(config)
    torch.manual_seed(3)
    for parameter in adapter_parameters(engine.module).values():
        parameter.data.normal_(std=0.2)  # B starts at zero, and hides the gates from the loss
    batch = collate(*map(list, zip(*tiny_samples(4), strict=True)), pad_id=0)
    one_step(engine, context, RouterLosses(engine, context, config, "global_batch", ("a", "b")), [batch])
    learns = [
        bool(found.abs().max() > 1e-9) for name, found in gradients(engine).items() if ".router." in name
    ]
    assert learns
    if config.num_experts == 1 and config.balance_coefficient:
        return  # a balance over one expert is a loss without a gradient; who asks for it asks for that
    assert any(learns) == (not config.idle_router())


@pytest.mark.parametrize("preset", ["task", "sequence"])
def test_it_is_told_of_every_kind_of_router(preset: str) -> None:
    config = MoloraConfig(router=preset, top_k=1, num_tasks=2)
    assert "always 1" in config.idle_router()
    assert not MoloraConfig(router=preset, top_k=2, num_tasks=2).idle_router()
    assert not MoloraConfig(router=preset, top_k=1, freeze_router=True).idle_router()
