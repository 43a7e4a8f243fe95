"""A router that is new to the package works in all of it, once it is where CONTRIBUTING.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import DECODER
from support.one_process import gradients, one_step, tiny_engine, tiny_samples
from torch import Tensor

from moe_medical.adapters.folder import load_adapter, save_adapter
from moe_medical.adapters.layer import MoloraLinear, Target
from moe_medical.adapters.model import adapter_parameters, load_adapter_state, trainable_parameters
from moe_medical.adapters.routers import ROUTERS, InitialValues, Router
from moe_medical.adapters.routing import SideInputs
from moe_medical.base_model.known_shapes import llama_shape
from moe_medical.config import MoloraConfig
from moe_medical.config.router_kinds import ROUTER_KINDS, RouterKind
from moe_medical.data.batches import collate
from moe_medical.errors import ConfigError
from moe_medical.planning.adapted_model import AdaptedModel
from moe_medical.training.router_losses import RouterLosses

META = {"base_model": "tiny", "base_revision": None, "tasks": ["a", "b"], "label_sets": {}}
CONFIG = MoloraConfig(router="distance", num_experts=4, top_k=2, rank=4, router_bias=False, dropout=0.0)
BALANCED = MoloraConfig(**{**vars(CONFIG), "balance_coefficient": 0.5})


class DistanceRouter(Router):
    """z_i = -|x - c_i|^2: experts whose centre is near."""

    def __init__(self, config: MoloraConfig, in_features: int, init: InitialValues):
        super().__init__(config, in_features, init)
        self.centre = init.linear(in_features, config.num_experts, in_features)

    def logits(self, x_TD: Tensor, side: SideInputs) -> Tensor:
        return -(x_TD.float().unsqueeze(1) - self.centre).square().sum(-1)


@pytest.fixture
def distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The places: its kind in `config/router_kinds.py`; its class and the row in `adapters/routers.py`."""
    monkeypatch.setitem(ROUTER_KINDS, "distance", RouterKind())
    monkeypatch.setitem(ROUTERS, "distance", DistanceRouter)


@pytest.mark.usefixtures("distance")
def test_it_is_the_loop_over_tokens() -> None:
    base = torch.nn.Linear(6, 5)
    layer = MoloraLinear(Target(base, CONFIG, "mlp", seed=1))
    layer.lora_B.data.normal_()
    x_TD = torch.randn(7, 6)
    for x, y in zip(x_TD, layer(x_TD), strict=True):
        logits = torch.stack([-(x - centre).square().sum() for centre in layer.router.centre])
        chosen = logits.argsort(descending=True)[: CONFIG.top_k]
        gates = logits[chosen].softmax(0)
        expected = base(x) + CONFIG.scaling * sum(
            gate * layer.lora_B[i] @ layer.lora_A[i] @ x for gate, i in zip(gates, chosen, strict=True)
        )
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("distance")
def test_a_step_trains_it_and_the_router_losses_reach_it() -> None:
    batch = collate(*map(list, zip(*tiny_samples(4), strict=True)), pad_id=0)
    found = []
    for config in (CONFIG, BALANCED):
        engine, context = tiny_engine(config)
        losses = RouterLosses(engine, context, config, "global_batch", ("a", "b"))
        one_step(engine, context, losses, [batch])
        trained = trainable_parameters(engine.module)
        assert {name for name in trained if name.endswith(".router.centre")}
        assert all(gradient.any() for gradient in gradients(engine).values())
        before = {name: p.detach().clone() for name, p in trained.items()}
        torch.optim.SGD(trained.values(), lr=0.1).step()
        assert not any(torch.equal(before[name], p) for name, p in trained.items())
        found.append(gradients(engine))
    without, with_losses = found
    routers = [name for name in without if ".router." in name]
    assert routers
    assert not any(torch.equal(without[name], with_losses[name]) for name in routers)


@pytest.mark.usefixtures("distance")
def test_it_survives_its_folder_and_is_planned_with_what_it_trains(tmp_path: Path) -> None:
    ids = torch.arange(3, 11)[None]
    model = tiny_engine(CONFIG)[0].module.eval()
    state = adapter_parameters(model)
    for parameter in state.values():
        parameter.data.normal_(std=0.1)
    save_adapter(tmp_path / "adapter", state, CONFIG, META)
    config, _, read = load_adapter(tmp_path / "adapter")
    fresh = tiny_engine(config)[0].module.eval()
    load_adapter_state(fresh, read)
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    planned = AdaptedModel.of(llama_shape("tiny", DECODER), CONFIG)
    assert planned.trainable == sum(p.numel() for p in trainable_parameters(model).values())


def test_without_these_places_it_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", {"x": torch.zeros(1)}, CONFIG, META)
    with pytest.raises(ConfigError, match=r"adapters\.router must be one of token"):
        load_adapter(tmp_path / "adapter")
