"""The linear layers of a frozen base model in 8 or 4 bits; adapters on top train and answer as on any base.

Decisions: quantised after loading, in place, so that one loader knows the weights' names. Output head and
embeddings stay as they are: their errors reach every token, and tied ones are one tensor. What computes is
the libraries' own: torchao's int8 weights (symmetric, one scale for each output feature) stay in `nn.Linear`,
and bitsandbytes' layers (LLM.int8, arXiv 2208.07339; NF4 of QLoRA, arXiv 2305.14314) are subclasses of it, so
that `adapters.layer` wraps them as before. Gradients flow to a layer's input, not to its weight. An int8
weight is a buffer: it is no parameter that anybody could train, shard or send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe_medical.errors import ConfigError, Problem

if TYPE_CHECKING:
    from moe_medical.config.schema import Quantization

_KEY = "model.quantization"


def quantize_base(model: nn.Module, kind: Quantization) -> None:
    """Quantise all linear layers but the output head; bitsandbytes' do so when they reach the GPU.

    Args:
        model: A base model without adapters, read whole.
        kind: As in `model.quantization`.

    Raises:
        ConfigError: the library is missing, there is no GPU for bitsandbytes, or no layer can be quantised.
    """
    if kind == "none":
        return
    layers = _linear_layers(model)
    if not layers:
        raise _error("must be none: this model has no nn.Linear besides its head", kind)
    if kind == "int8":
        _to_int8(model, layers)
    else:
        _to_bitsandbytes(model, layers, kind)


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def _to_int8(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise _error("needs torchao", "int8", "pip install 'moe-medical[quantization]'") from None
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda _, name: name in layers)
    for layer in layers.values():
        weight = layer.weight.detach()
        del layer.weight
        # As a parameter it could be neither moved nor broadcast by DeepSpeed, which knows plain tensors only.
        layer.register_buffer("weight", weight, persistent=False)


def _to_bitsandbytes(model: nn.Module, layers: dict[str, nn.Linear], kind: str) -> None:
    if not torch.cuda.is_available():
        raise _error("must be none or int8 where there is no GPU", kind)
    try:
        import bitsandbytes
    except ImportError:
        raise _error("needs bitsandbytes", kind, "pip install 'moe-medical[quantization-gpu]'") from None
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _bitsandbytes_layer(bitsandbytes.nn, layer, kind))


def _bitsandbytes_layer(kinds: Any, layer: nn.Linear, kind: str) -> nn.Module:
    """The same layer, its values still whole: they are quantised on their way to the GPU."""
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if kind == "bnb8":
        new = kinds.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        new.weight = kinds.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        new = kinds.Linear4bit(*sizes, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta")
        new.weight = kinds.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
    new.bias = layer.bias
    return new.requires_grad_(False).train(layer.training)


def _error(rule: str, kind: str, fix: str = "") -> ConfigError:
    return ConfigError("model", [Problem(_KEY, rule, kind, fix)])
