"""What every benchmark of the adapters starts from, and how one step of an arm is measured.

Decisions: all arms share the frozen weights of one base model in memory, so that many can take turns. The
adapters' numbers follow from the module's name alone, so that arms which compute the same function can be
given the same numbers and compared. B is not zero and the routers' biases are: else no output would tell two
arms apart, and a class without a bias could not compute the same.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
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
from moe_medical.console import ProgressLine

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


# Measuring


class Budget:
    """Minutes shared out between the parts that are still to come, and shown."""

    def __init__(self, minutes: float, weights: list[float], least: int, most: int, line: ProgressLine):
        self._end, self._weights, self._line = time.monotonic() + 60 * minutes, weights, line
        self._least, self._most = least, most
        self._rounds = 0
        self._shown = time.monotonic()
        self._until = self._end

    def begin(self, note: str) -> None:
        """Start the next part."""
        now = time.monotonic()
        self._until = now + max(self._end - now, 0.0) * self._weights[0] / sum(self._weights)
        self._weights, self._rounds = self._weights[1:], 0
        self.tell(note)

    def tell(self, note: str) -> None:
        seconds = int(time.monotonic() - self._shown)
        self._shown += seconds
        self._line.advance(seconds, note)

    def more(self, note: str, took: float) -> bool:
        """Whether there is time for another round like the last one."""
        self.tell(f"{note}, round {self._rounds + 1}")
        self._rounds += 1
        time_left = time.monotonic() + took <= self._until
        return self._rounds <= self._least or (time_left and self._rounds <= self._most)


MOST_DEVIATION = 0.01
"""Of what the adapters change in the logits of a token; rounding is far below."""


class TooDifferent(RuntimeError):
    """An arm that should compute the same function does not."""


def forward(arm: Arm, dtype: torch.dtype) -> Tensor:
    """Logits, under autocast where the base model is not in float32."""
    device = next(arm.model.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        return arm.logits()


def step(arm: Arm, dtype: torch.dtype) -> None:
    """Forward, mean of the squared logits, backward; gradients are dropped, no optimizer step."""
    with arm.around():
        forward(arm, dtype).float().square().mean().backward()
    for tensor in (*arm.parameters, *arm.leaves):
        tensor.grad = None


def timed(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of the processor, of the wall clock, and of the GPU between two events, with its peak."""
    gc.collect()
    gc.disable()
    try:
        return _on_gpu(action, device) if device.type == "cuda" else _on_cpu(action)
    finally:
        gc.enable()


def _on_cpu(action: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return {"cpu_ms": 1e3 * (time.process_time() - cpu), "wall_ms": 1e3 * (time.perf_counter() - wall)}


def _on_gpu(action: Callable[[], object], device: torch.device) -> dict[str, float]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = _on_cpu(lambda: _until_done(action, end, device))
    peak = torch.cuda.max_memory_allocated(device) - before
    return result | {"gpu_ms": begin.elapsed_time(end), "peak_mib": peak / 2**20}


def _until_done(action: Callable[[], object], end: torch.cuda.Event, device: torch.device) -> None:
    action()
    end.record()
    torch.cuda.synchronize(device)


class Saved:
    """Bytes of the storages that autograd keeps for backward, each once; the model's own are not counted."""

    def __init__(self, arm: Arm):
        owned = (*arm.model.parameters(), *arm.model.buffers(), *arm.parameters)
        self._owned = {tensor.untyped_storage().data_ptr() for tensor in owned}
        self._seen: dict[tuple[int, int], torch.UntypedStorage] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._owned:
            self._seen[storage.data_ptr(), storage.nbytes()] = storage  # held, or its address is given again
        return tensor.detach()  # an operator's own output would hold the graph that holds it

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self._seen)


def looked_at(arm: Arm, dtype: torch.dtype) -> tuple[int, Tensor]:
    """(bytes saved by a forward up to the loss, its float32 logits)."""
    saved = Saved(arm)
    with arm.around(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        logits = forward(arm, dtype).float()
        logits.square().mean()
    return saved.bytes, logits.detach()


@torch.no_grad()
def evaluated(arm: Arm) -> Tensor:
    """Float32 logits without dropout."""
    arm.model.eval()
    with arm.around():
        logits = arm.logits().float()
    arm.model.train()
    return logits


def deviation(logits_BSV: Tensor, ours_BSV: Tensor, base_BSV: Tensor) -> float:
    """Norm of a token's difference, relative to that of what the adapters change; median over the tokens.

    The median, because a router's near tie may go either way for a few tokens.

    Raises:
        TooDifferent: It is no rounding.
    """
    relative_BS = (logits_BSV - ours_BSV).norm(dim=-1) / (ours_BSV - base_BSV).norm(dim=-1)
    median = float(relative_BS.median())
    if not median <= MOST_DEVIATION:
        raise TooDifferent(f"logits differ by {median:.3g} of what the adapters change")
    return median


def spread(values: Sequence[float]) -> dict[str, float]:
    figures = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 4) for name, value in figures.items()}


def spreads(rounds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of every figure of several rounds."""
    return {name: spread([one[name] for one in rounds]) for name in rounds[0]}


def ratio(rounds: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of pairs, each measured in one round."""
    return spread([above / below for above, below in rounds])


def shifted(items: Iterable[Any], by: int) -> list[Any]:
    """The same items from another one on, so that none is always first."""
    every = list(items)
    by %= max(len(every), 1)
    return every[by:] + every[:by]
