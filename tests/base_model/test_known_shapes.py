"""Shapes worked out from a config.json are those of the model that transformers builds from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.tiny import write_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moe_medical.adapters.layer import linear_sizes
from moe_medical.adapters.model import adaptable_modules
from moe_medical.base_model import locate_base
from moe_medical.base_model.known_shapes import KNOWN, known_shape, llama_shape, shape_of
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama-8b": 8_030_261_248,
    "qwen-32b": 32_763_876_352,
    "llama-70b": 70_553_706_496,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {"model_type": "mistral", "head_dim": 8},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 16},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_it_is_what_transformers_builds(changes: dict[str, object]) -> None:
    config = SMALL | {"tie_word_embeddings": False} | changes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shape = llama_shape("it", config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    found = {n: linear_sizes(model.get_submodule(n)) for n in adaptable_modules(model)}
    assert {n: (s.in_features, s.out_features) for n, s in shape.linears.items()} == found


def test_known_models_have_their_published_size() -> None:
    sizes = {name: known_shape(name).parameters for name in KNOWN}
    assert sizes.pop("tiny") < 200_000
    assert sizes == PUBLISHED


def test_weights_and_config_tell_the_same(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    from_weights = shape_of(locate_base(ModelSection(name=str(folder))))
    from_config = known_shape(str(folder))
    assert list(from_weights.linears) == list(from_config.linears)  # in the order in which they run
    for field in ("linears", "parameters", "hidden", "blocks", "vocabulary", "tied"):
        assert getattr(from_weights, field) == getattr(from_config, field)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "must be one of tiny, "),
        ("{", "not JSON"),
        (json.dumps({"hidden_size": 8}), "num_hidden_layers must be given"),
        (json.dumps(SMALL | {"model_type": "gpt2"}), "model_type must be one of llama, "),
    ],
)
def test_what_is_not_understood_is_refused(config: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if config is not None:
        path.write_text(config)
    with pytest.raises(ConfigError, match=message):
        known_shape(str(path))
