"""A base is loaded whole or left unread by the same rules; stored tensors are read in parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from moe_medical.base_model import BaseModel
from moe_medical.base_model.load import load_base, load_unread_base
from moe_medical.base_model.stored import stored_tensors
from moe_medical.errors import DataError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def _base(folder: Path) -> BaseModel:
    return BaseModel(folder.name, None, folder, json.loads((folder / "config.json").read_text()))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path)
    return tmp_path


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Rewrite the weights; `__` stands for a dot, None removes a tensor."""
    path = folder / "model.safetensors"
    kept = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({n: t for n, t in kept.items() if t is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_part_of_a_stored_tensor_can_be_read(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    values = torch.randn(shape).to(dtype)
    save_file({"x": values}, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)["x"]
    flat = values.view(-1)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert torch.equal(stored.read(start, stop), flat[start:stop])
    assert stored.shape == values.shape


def test_every_stored_tensor_is_found_under_its_parameter(llama: Path) -> None:
    _change(llama, model__rotary_emb__inv_freq=torch.ones(4), unused=torch.ones(2))
    whole = load_base(_base(llama), "bfloat16")
    unread = load_unread_base(_base(llama), "bfloat16")
    values = {n: t.read().view(t.shape).bfloat16() for n, t in unread.stored.items()}
    assert values.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(values[name], p) for name, p in whole.named_parameters())
    assert all(p.untyped_storage().nbytes() == 2 for p in unread.model.parameters())


def test_buffers_are_those_of_the_whole_model(tmp_path: Path) -> None:
    """Gemma 4 has stored ones, made ones in the model's dtype, and made ones in float32."""
    extra = {"head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    model = Gemma4ForCausalLM(Gemma4TextConfig(**SIZES, **extra))
    model.model.layers[0].layer_scalar.fill_(3.25)
    model.save_pretrained(tmp_path)
    whole = dict(load_base(_base(tmp_path), "bfloat16").named_buffers())
    unread = dict(load_unread_base(_base(tmp_path), "bfloat16").model.named_buffers())
    assert {n: b.dtype for n, b in unread.items()} == {n: b.dtype for n, b in whole.items()}
    assert all(torch.equal(unread[name], buffer) for name, buffer in whole.items())
    assert {b.dtype for b in unread.values()} == {torch.float32, torch.bfloat16}
    assert unread["model.layers.0.layer_scalar"] == 3.25


@pytest.mark.parametrize("equal", [True, False])
def test_two_copies_of_a_tied_tensor_are_tied_only_if_equal(equal: bool, llama: Path) -> None:
    embedding = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
    _change(llama, lm_head__weight=embedding.clone() if equal else embedding + 1)
    for model in (load_base(_base(llama), "float32"), load_unread_base(_base(llama), "float32").model):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is equal


def test_a_lost_tensor_is_named(llama: Path) -> None:
    _change(llama, model__norm__weight=None)
    for load in (load_base, load_unread_base):
        with pytest.raises(DataError, match=r"lacks weights of a llama model: model\.norm\.weight"):
            load(_base(llama), "float32")


def test_a_tensor_of_another_shape_is_refused(llama: Path) -> None:
    _change(llama, model__norm__weight=torch.ones(3))
    for load in (load_base, load_unread_base):
        with pytest.raises(DataError, match="cannot be loaded"):
            load(_base(llama), "float32")


def test_a_cut_file_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors is not a readable safetensors file"):
        load_unread_base(_base(llama), "float32")


def test_weights_that_are_converted_on_loading_are_refused(tmp_path: Path) -> None:
    MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"converts model\.layers\.0.* of a mixtral model.*Use ZeRO-2"):
        load_unread_base(_base(tmp_path), "float32")
