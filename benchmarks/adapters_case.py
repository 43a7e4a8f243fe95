"""What every arm of `benchmarks/adapters.py` starts from: a base model, a batch, and the adapters' numbers.

Decisions: all arms share the frozen weights of one base model in memory, so that many can take turns. The
adapters' numbers follow from the module's name alone, so that arms which compute the same function can be
given the same numbers and compared. B is not zero and the routers' biases are: else no output would tell two
arms apart, and a class without a bias could not compute the same.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe_medical.adapters.layer import linear_sizes
from moe_medical.base_model import locate_base
from moe_medical.base_model.embedded import EMBEDDED_NAME
from moe_medical.base_model.load import load_base
from moe_medical.config.schema import ModelSection

SMALL, LARGE = "small Llama", "SmolLM2-135M"
SEED, ROWS, POSITIONS, TASKS = 17, 2, 256, 28
TARGETS = ("gate_proj", "up_proj", "down_proj")
SCALING = 2.0
"""alpha / rank of every adapter."""


@dataclass(frozen=True)
class Shape:
    """Experts of each linear layer."""

    experts: int
    rank: int
    """Of one expert."""
    top_k: int = 2

    def __str__(self) -> str:
        return f"E{self.experts} r{self.rank} k{self.top_k}"

    @property
    def total_rank(self) -> int:
        return self.experts * self.rank


SHAPES = (Shape(8, 8), Shape(8, 16), Shape(16, 16), Shape(64, 16))


@dataclass(frozen=True)
class Numbers:
    """The adapter of one linear layer."""

    A_ErD: Tensor
    B_EFr: Tensor
    router_ED: Tensor


@dataclass(frozen=True)
class Case:
    """One base model with one shape of adapters."""

    title: str
    base: nn.Module
    shape: Shape
    ids_BS: Tensor
    tasks_B: Tensor

    @property
    def device(self) -> torch.device:
        return self.ids_BS.device

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name -> (in, out) features of the linears to adapt."""
        sizes = {name: linear_sizes(m) for name, m in self.base.named_modules()}
        return {n: size for n, size in sizes.items() if size and n.rpartition(".")[2] in TARGETS}

    def model(self) -> nn.Module:
        """Another model on the same frozen weights."""
        shared = {id(t): t for t in (*self.base.parameters(), *self.base.buffers())}
        return copy.deepcopy(self.base, shared)

    def numbers(self, linear: str) -> Numbers:
        """Those that any arm gives to a linear, on the CPU."""
        return numbers_of(linear, *self.linears[linear], self.shape)


@lru_cache(maxsize=4)
def numbers_of(linear: str, features: int, out: int, shape: Shape) -> Numbers:
    draw = torch.Generator().manual_seed(zlib.crc32(linear.encode()) + SEED)
    A_ErD = torch.randn(shape.experts, shape.rank, features, generator=draw) / features**0.5
    B_EFr = torch.randn(shape.experts, out, shape.rank, generator=draw) * 0.02
    router_ED = torch.randn(shape.experts, features, generator=draw) / features**0.5
    return Numbers(A_ErD, B_EFr, router_ED)


@dataclass
class Arm:
    """Something to be timed: one forward, whose backward reaches `parameters`."""

    model: nn.Module
    logits: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    """Trainable ones."""
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Spans forward and backward."""
    leaves: list[Tensor] = field(default_factory=list)
    """Other tensors that get a gradient."""


@dataclass(frozen=True)
class Kind:
    """How to make an arm, and what it computes."""

    name: str
    build: Callable[[Case], Arm]
    family: str
    """`base`, `peft`, `ours`, `package` or `form`."""
    gate: str
    """What decides the gates, and how many experts a token uses."""
    dropout: float = 0.0
    same_as: str = ""
    """Arm of ours that computes the same function; their outputs are compared before anything is timed."""
    package: str = ""
    """Distribution that must be installed."""
    lead: bool = False
    """Whether it runs on the large base model too."""
    costly: bool = False
    """Whether it takes minutes where there are many experts in many layers."""
    note: str = ""

    @property
    def routes_tokens(self) -> bool:
        return self.gate.startswith("token")


def small_base() -> nn.Module:
    """Random Llama of two layers."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def embedded_base() -> nn.Module:
    """SmolLM2-135M-Instruct."""
    model = load_base(locate_base(ModelSection(name=EMBEDDED_NAME)), "float32")
    model.config.use_cache = False
    return model


BASES: dict[str, Callable[[], nn.Module]] = {SMALL: small_base, LARGE: embedded_base}


def batch_of(model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, S) and the rows' tasks (B,)."""
    draw = torch.Generator().manual_seed(SEED)
    ids_BS = torch.randint(0, model.config.vocab_size, (ROWS, POSITIONS), generator=draw)
    return ids_BS.to(device), torch.arange(ROWS, device=device) % TASKS


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def plain_logits(model: nn.Module, case: Case, **more: Any) -> Tensor:
    logits: Tensor = model(input_ids=case.ids_BS, use_cache=False, **more).logits
    return logits
