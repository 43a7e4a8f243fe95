"""The shape of a Llama-like model from its config.json alone, and a few well-known ones by name.

For plans: nothing is loaded or allocated, no weights are needed, no torch. Where the weights are at hand,
`shapes.py` reads the real shapes from their headers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.base_model.locate import BaseModel
from moe_medical.base_model.shapes import LinearShape, linear_shapes, num_parameters
from moe_medical.config.layer_names import RUN_ORDER
from moe_medical.errors import ConfigError, Problem

_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class BaseShape:
    """A frozen causal LM, as far as memory and traffic depend on it."""

    name: str
    linears: Mapping[str, LinearShape]
    """Linear layers of the blocks by full module name, in the order in which they run."""
    parameters: int
    """All of them; tied ones once."""
    hidden: int
    blocks: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""


KNOWN: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen-32b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Keys of config.json; of Llama-3.2-1B, Llama-2-7B, Llama-3.1-8B, Qwen2.5-32B and Llama-3.1-70B."""


def known_shape(name: str) -> BaseShape:
    """A shape by name, or from the path of a Llama-like config.json.

    Raises:
        ConfigError: neither, or a config that is not understood.
    """
    if name in KNOWN:
        return llama_shape(name, KNOWN[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        rule = f"must be one of {', '.join(KNOWN)}, or a readable config.json"
        reason = e.strerror if isinstance(e, OSError) else "not JSON"
        raise ConfigError("the command line", [Problem("--shape", rule, f"{name} ({reason})")]) from None
    return llama_shape(str(path), config if isinstance(config, dict) else {})


def llama_shape(name: str, config: Mapping[str, Any]) -> BaseShape:
    """Work out the layers of a Llama-like model.

    Args:
        name: What to call it.
        config: Its config.json.

    Raises:
        ConfigError: keys are missing, or the model type is another one.
    """
    problems = [Problem(f"--shape: {key}", "must be given") for key in _NEEDED if not config.get(key)]
    if (kind := config.get("model_type", "llama")) not in _LLAMA_LIKE:
        problems.append(Problem("--shape: model_type", f"must be one of {', '.join(_LLAMA_LIKE)}", kind))
    if problems:
        raise ConfigError(name, problems)
    hidden, blocks, vocabulary = (
        int(config[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    )
    linears = _llama_linears(config)
    weights = sum(s.in_features * s.out_features for s in linears.values())
    vectors = (2 * blocks + 1) * hidden + _biases(config, linears) + _head_norms(config)
    tied = bool(config.get("tie_word_embeddings", False))
    total = weights + vectors + (1 if tied else 2) * vocabulary * hidden
    return BaseShape(name, linears, total, hidden, blocks, vocabulary, tied)


def shape_of(base: BaseModel) -> BaseShape:
    """The shape of a base model on this machine, from the headers of its weights."""
    shapes = linear_shapes(base)
    config = base.config
    blocks = {name: s for name, s in shapes.items() if block_of(name) >= 0}
    hidden = int(config.get("hidden_size") or config.get("n_embd") or next(iter(shapes.values())).in_features)
    return BaseShape(
        name=base.name,
        linears=dict(sorted(blocks.items(), key=lambda item: _position(item[0]))),
        parameters=num_parameters(base),
        hidden=hidden,
        blocks=1 + max((block_of(name) for name in blocks), default=-1),
        vocabulary=int(config.get("vocab_size") or 0),
        tied=not any(name.endswith("lm_head") for name in shapes),
    )


def block_of(name: str) -> int:
    """Number of the block that a module is in, -1 outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def _position(name: str) -> tuple[int, int, str]:
    roles = [i for i, role in enumerate(RUN_ORDER) if name.endswith(f".{role}")]
    return block_of(name), roles[0] if roles else len(RUN_ORDER), name


def _llama_linears(config: Mapping[str, Any]) -> dict[str, LinearShape]:
    hidden = int(config["hidden_size"])
    inner = int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head = _head_size(config)
    query = heads * head
    key = int(config.get("num_key_value_heads") or heads) * head
    block = {
        "self_attn.q_proj": LinearShape(hidden, query),
        "self_attn.k_proj": LinearShape(hidden, key),
        "self_attn.v_proj": LinearShape(hidden, key),
        "self_attn.o_proj": LinearShape(query, hidden),
        "mlp.gate_proj": LinearShape(hidden, inner),
        "mlp.up_proj": LinearShape(hidden, inner),
        "mlp.down_proj": LinearShape(inner, hidden),
    }
    numbers = range(int(config["num_hidden_layers"]))
    return {f"model.layers.{i}.{name}": shape for i in numbers for name, shape in block.items()}


def _biases(config: Mapping[str, Any], linears: Mapping[str, LinearShape]) -> int:
    """Qwen2 has biases at q, k and v; Llama's `attention_bias` is of all four, `mlp_bias` of the others."""
    parts: tuple[str, ...] = ()
    if config.get("model_type") == "qwen2":
        parts += ("q_proj", "k_proj", "v_proj")
    elif config.get("attention_bias"):
        parts += ("q_proj", "k_proj", "v_proj", "o_proj")
    if config.get("mlp_bias"):
        parts += ("gate_proj", "up_proj", "down_proj")
    return sum(s.out_features for name, s in linears.items() if name.endswith(parts)) if parts else 0


def _head_norms(config: Mapping[str, Any]) -> int:
    """Qwen3 normalises queries and keys head by head."""
    return (
        2 * _head_size(config) * int(config["num_hidden_layers"])
        if config.get("model_type") == "qwen3"
        else 0
    )


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
