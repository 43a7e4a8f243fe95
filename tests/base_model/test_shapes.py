"""What the safetensors headers say of a model is what the loaded model has."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.adapter_summary import summarize_adapters
from support.tiny import write_tiny_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moe_medical.adapters.layer import linear_sizes
from moe_medical.adapters.model import adaptable_modules, attach_adapters
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.base_model.shapes import linear_shapes, num_parameters
from moe_medical.config import MoloraConfig
from moe_medical.config.adapters import PRESETS
from moe_medical.config.schema import ModelSection
from moe_medical.errors import DataError
from moe_medical.planning.plan import plan_layers


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "llama":
        write_tiny_model(folder)
    else:
        config = GPT2Config(vocab_size=60, n_positions=32, n_embd=24, n_layer=2, n_head=4)
        GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    return locate_base(ModelSection(str(folder)))


def test_shapes_are_those_of_the_modules(base: BaseModel) -> None:
    model = load_base(base, "float32")
    real = {name: linear_sizes(model.get_submodule(name)) for name in adaptable_modules(model)}
    read = {name: (s.in_features, s.out_features) for name, s in linear_shapes(base).items()}
    assert real.items() <= read.items()
    assert all("embed" in name or "wte" in name or "wpe" in name for name in read.keys() - real.keys())
    assert any(inputs != outputs for inputs, outputs in real.values())
    assert num_parameters(base) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "adapters",
    [
        MoloraConfig(),
        MoloraConfig(num_experts=3, rank=5),
        MoloraConfig(num_experts=1, top_k=1),
        replace(PRESETS["lora"], rank=4),
    ],
    ids=["ming_moe", "three_experts", "one_expert", "lora"],
)
def test_the_plan_counts_what_is_attached(base: BaseModel, adapters: MoloraConfig) -> None:
    model = load_base(base, "float32")
    attach_adapters(model, adapters, seed=0)
    layers = plan_layers(base, adapters)
    attached = summarize_adapters(model)
    assert sum(layer.parameters for layer in layers) == attached.num_parameters
    kinds = [layer.kind for layer in layers]
    assert (kinds.count("molora"), kinds.count("lora")) == (attached.num_molora, attached.num_lora)


def test_a_second_copy_of_the_weights_is_not_counted(base: BaseModel, tmp_path: Path) -> None:
    counted = num_parameters(base)
    for path in base.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "consolidated.safetensors").write_bytes(save({"tok_embeddings.weight": torch.zeros(2, 2)}))
    assert num_parameters(BaseModel("x", None, tmp_path, base.config)) == counted


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_unreadable_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataError, match=r"index\.json is not a readable safetensors index$"):
        linear_shapes(BaseModel("x", None, tmp_path, {}))


@pytest.mark.parametrize("kind", ["empty", "short header", "endless header", "no JSON"])
def test_unreadable_header(kind: str, tmp_path: Path) -> None:
    whole = save({"a.weight": torch.zeros(2, 2)})
    contents = {
        "empty": b"",
        "short header": whole[:20],
        "endless header": struct.pack("<Q", 2**60) + whole[8:],
        "no JSON": whole[:8] + b"x" * (len(whole) - 8),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(contents[kind])
    with pytest.raises(DataError, match=f"^{path} is not a readable safetensors file$"):
        linear_shapes(BaseModel("x", None, tmp_path, {}))


def test_an_embedding_is_not_a_layer_of_its_own(base: BaseModel) -> None:
    """The presets' patterns must not reach embeddings or the head, which look like linears in a header."""
    names = {layer.name for layer in plan_layers(base, MoloraConfig())}
    model = load_base(base, "float32")
    modules = dict(model.named_modules())
    assert not any(isinstance(modules[name], nn.Embedding) for name in names)
