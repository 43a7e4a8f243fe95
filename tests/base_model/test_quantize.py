"""A quantised base: what is quantised, adapters that train and answer on it, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.served import SIZES, write_adapter
from support.tiny import write_tiny_model, write_tiny_run
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from moe_medical.adapters.layer import linear_sizes
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.base_model.quantize import quantize_base
from moe_medical.config import MoloraConfig, load_config
from moe_medical.config.rules import model_problems
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError
from moe_medical.serving.adapted import load_shared_base
from moe_medical.serving.answers import Generation, answer_all

ADAPTERS = MoloraConfig(top_k=2, **SIZES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return locate_base(ModelSection(str(write_tiny_model(tmp_path_factory.mktemp("model")))))


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def _dequantised(model: nn.Module) -> nn.Module:
    """The oracle: the same values in plain weights."""
    for layer in _linears(model).values():
        weight = layer.weight.dequantize()
        del layer.weight
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_is_near_and_a_quarter_as_large(dtype: str, base: BaseModel) -> None:
    whole, model = load_base(base, dtype), load_base(base, dtype, "int8")
    for name, layer in _linears(model).items():
        weight = whole.get_parameter(f"{name}.weight").float()
        step = weight.abs().amax(1, keepdim=True) / 127
        apart = (layer.weight.dequantize().float() - weight).abs()
        assert (apart <= step * (0.51 if dtype == "float32" else 1.5)).all()
        assert linear_sizes(layer) == linear_sizes(whole.get_submodule(name))
        assert {t.dtype for t in _parts(layer.weight)} >= {torch.int8}
        assert sum(t.nbytes for t in _parts(layer.weight)) < weight.numel() * 1.3
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_adapters_train_on_int8_as_on_the_same_values(base: BaseModel) -> None:
    found = [_gradients(load_base(base, "float32", "int8")), _gradients(_dequantised(_int8(base)))]
    assert found[0].keys() == found[1].keys()
    assert any("router" in name for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)
        assert gradient.abs().max() > 0


def test_an_adapter_answers_on_int8(base: BaseModel, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base.folder, ADAPTERS, meta={"quantization": "int8"})
    prompts = ["w1 w2", "w3"]
    answers = []
    for kind in (None, "none"):
        adapted = load_shared_base(adapter, quantization=kind).adapt(adapter)
        is_int8 = any(torch.int8 in {t.dtype for t in _parts(p)} for p in adapted.model.buffers())
        assert is_int8 is (kind is None)
        answers.append(answer_all(adapted, prompts, [()] * 2, Generation(6)))
        assert answers[-1] == [answer_all(adapted, [p], [()], Generation(6))[0] for p in prompts]
    assert all(answers[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes may be used with a GPU")
@pytest.mark.parametrize("kind", ["bnb8", "bnb4"])
def test_bitsandbytes_needs_a_gpu(kind: str, base: BaseModel) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization must be none or int8 where there is no GPU"):
        load_base(base, "float32", kind)  # type: ignore[arg-type]


def test_a_model_without_linear_layers_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11))
    with pytest.raises(ConfigError, match=r"no nn\.Linear besides its head"):
        quantize_base(model, "int8")


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["model.quantization=int8", "adapters.experts=ffn"], "adapters.experts ffn"),
        (["model.quantization=int8", "adapters.dora=true"], "adapters.dora"),
        (["model.quantization=bnb4"], "bitsandbytes needs a GPU"),
        (["model.quantization=int8", "ZERO3"], "under ZeRO-3"),
        (["model.quantization=int8"], ""),
        ([], ""),
    ],
)
def test_what_a_quantised_base_cannot_do(overrides: list[str], rule: str, tmp_path: Path) -> None:
    config = load_config(write_tiny_run(tmp_path))
    for override in overrides:
        section, _, rest = override.partition(".")
        if override == "ZERO3":
            config.parallel.deepspeed = config.parallel.deepspeed.replace("zero2", "zero3")
        else:
            key, _, value = rest.partition("=")
            changed = replace(getattr(config, section), **{key: True if value == "true" else value})
            setattr(config, section, changed)
    found = list(model_problems(config))
    assert len(found) == bool(rule)
    assert all(rule in problem.rule for problem in found)


def _int8(base: BaseModel) -> nn.Module:
    return load_base(base, "float32", "int8")


def _parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """Plain tensors that hold a weight's values."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the adapters, and of the text that goes in."""
    attach_adapters(model, ADAPTERS, seed=1)
    torch.manual_seed(4)
    parameters = adapter_parameters(model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    ids = torch.arange(3, 23).view(2, 10)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    model(inputs_embeds=embedded, labels=ids).loss.backward()
    assert embedded.grad is not None
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    return gradients | {"inputs": embedded.grad}
