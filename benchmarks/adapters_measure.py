"""One step of an arm timed, what it keeps for backward counted, and two arms' outputs compared."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from adapters_case import Arm
from torch import Tensor

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
