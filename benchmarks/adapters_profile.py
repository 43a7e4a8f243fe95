"""Where the time of two arms goes, by groups of operators, under torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

GROUPS = {
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "matmul", "einsum"),
    "gather and scatter": ("gather", "scatter", "index", "select", "sort", "nonzero", "one_hot", "where"),
    "softmax and top-k": ("softmax", "topk", "logsumexp"),
    "dropout": ("dropout", "bernoulli"),
    "copies, zeros and casts": ("copy", "clone", "contiguous", "zero", "fill", "cat", "stack", "empty"),
    "element-wise and sums": ("add", "mul", "sub", "div", "silu", "pow", "sum", "mean", "neg", "rsqrt"),
}
"""By parts of an operator's name; the first that fits counts."""
MOST_NAMED = 12


def profile(actions: dict[str, Callable[[], object]], times: int) -> dict[str, Any]:
    """Milliseconds of each action by group of operators, without what an operator calls."""
    return {name: _profile(action, times) for name, action in actions.items()}


def _profile(action: Callable[[], object], times: int) -> dict[str, Any]:
    action()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            action()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    groups: dict[str, float] = {}
    for event in events:
        group = group_of(event.key)
        groups[group] = groups.get(group, 0.0) + event.self_cpu_time_total / 1e3 / times
    named = {
        e.key: [round(e.self_cpu_time_total / 1e3 / times, 2), e.count // times] for e in events[:MOST_NAMED]
    }
    return {
        "total_ms": round(sum(groups.values()), 2),
        "operators": sum(event.count for event in events) // times,
        "groups_ms": {name: round(ms, 2) for name, ms in sorted(groups.items(), key=lambda item: -item[1])},
        "largest_ms_and_calls": named,
    }


def group_of(operator: str) -> str:
    if not operator.startswith("aten::"):
        return "autograd and Python"
    name = operator.removeprefix("aten::")
    return next((group for group, parts in GROUPS.items() if any(p in name for p in parts)), "the rest")


def in_words(profiles: dict[str, Any], ours: str, other: str, unit: str) -> str:
    """The groups of operators in which two arms differ most."""
    mine, theirs = profiles[ours], profiles[other]
    names = {*mine["groups_ms"], *theirs["groups_ms"]}
    apart = {name: mine["groups_ms"].get(name, 0.0) - theirs["groups_ms"].get(name, 0.0) for name in names}
    largest = sorted(apart.items(), key=lambda item: -abs(item[1]))[:3]
    told = ", ".join(f"{group} {ms:+.1f} ms" for group, ms in largest)
    share = 100 * mine["groups_ms"].get("matrix products", 0.0) / mine["total_ms"]
    return (
        f"{unit} of {ours} takes {mine['total_ms']:.1f} ms in {mine['operators']} operators, of {other} "
        f"{theirs['total_ms']:.1f} ms in {theirs['operators']}: {told}. "
        f"Matrix products are {share:.0f} % of ours."
    )
