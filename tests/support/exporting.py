"""Trained-looking adapters on tiny bases, and what they say."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_medical.adapters.folder import load_adapter, save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters, load_adapter_state
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import ModelSection
from support.families import DECODER, GPT2

ATTENTION, MLP = r".*\.(self_attn|attn)\.\w+", r".*\.mlp\.\w+"
LORA = MoloraConfig(rank=4, alpha=8.0, molora=(), lora=(MLP, ATTENTION))
TASK = MoloraConfig(
    router="task", num_tasks=3, num_experts=4, top_k=0, rank=4, alpha=8.0, molora=(MLP,), lora=(ATTENTION,)
)
TOKEN = replace(TASK, router="token", num_tasks=0)
TASKS = ["triage", "codes", "report"]
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))


def write_base(folder: Path, family: str = "llama", dtype: str = "float32", shard: str = "5GB") -> Path:
    """A tiny random model of any family, without a tokenizer; `shard` is the largest size of a file."""
    torch.manual_seed(3)
    settings = {**GPT2, "eos_token_id": 2} if family == "gpt2" else DECODER
    config = CONFIG_MAPPING[family](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def write_adapter(folder: Path, base: Path, config: MoloraConfig, size: float = 0.3) -> Path:
    """An adapter whose every tensor is random, as after training."""
    model = load_base(locate_base(ModelSection(str(base))), "float32")
    attach_adapters(model, config, seed=0)
    generator = torch.Generator().manual_seed(7)
    state = {n: _trained(n, p.detach(), size, generator) for n, p in adapter_parameters(model).items()}
    meta = {"base_model": str(base), "base_revision": None, "tasks": TASKS, "label_sets": {}}
    save_adapter(folder, state, config, meta)
    return folder


def _trained(name: str, first: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = size * torch.randn(first.shape, generator=generator)
    return first * (1 + noise) if name.endswith((".magnitude", ".weight")) else first + noise


def adapted_model(base: Path, adapter: Path) -> tuple[nn.Module, RoutingContext]:
    """The unmerged model, in float32."""
    config, _, state = load_adapter(adapter)
    model = load_base(locate_base(ModelSection(str(base))), "float32")
    context = attach_adapters(model, config, seed=0)
    load_adapter_state(model, state)
    return model.eval(), context


@torch.no_grad()
def adapted_logits(base: Path, adapter: Path, task: str | None = None) -> Tensor:
    """What the adapter's own model says."""
    model, context = adapted_model(base, adapter)
    bound = (
        nullcontext()
        if task is None
        else context.bind(BatchInputs.of_rows(torch.tensor([TASKS.index(task)] * len(IDS))))
    )
    with bound:
        return model(IDS).logits


@cache
@torch.no_grad()
def plain_logits(folder: Path) -> Tensor:
    """What transformers alone makes of a folder, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(IDS).logits
