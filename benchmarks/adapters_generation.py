"""Tokens per second of greedy generation with a KV cache, adapters merged and not.

Every arm makes the same number of new tokens from the same prompts by transformers' own `generate`; one task
for all rows. Tokens per second are by the wall clock, the ratios of rounds by processor time on a CPU. The
merged model is written by `moe_medical.interop.merge` and loaded from its folder.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapters_arms import attach, lora_arm, settings, task_settings
from adapters_common import (
    BASES,
    LARGE,
    SEED,
    TASKS,
    Case,
    Shape,
    batch_of,
    shifted,
    spread,
    timed,
)
from torch import Tensor, nn

from moe_medical.adapters.folder import save_adapter
from moe_medical.adapters.model import adapter_parameters, lay_out_for_answers
from moe_medical.adapters.routing import BatchInputs, RoutingContext
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.embedded import EMBEDDED_NAME
from moe_medical.base_model.load import load_base
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.interop.merge import merge_adapter

LOG = logging.getLogger("benchmarks.adapters")
SHAPE, PROMPT, PROFILED_TOKENS = Shape(8, 16), 64, 4
BASE, MERGED, UNMERGED_TASK, UNMERGED_TOKEN = "base", "task merged", "ours task", "ours token"
PEFT = "PEFT LoRA E*r"


@dataclass
class Writer:
    """A model that continues prompts."""

    model: nn.Module
    around: Callable[[int], AbstractContextManager[Any]] = field(default=lambda rows: nullcontext())
    """Given the number of rows."""

    @torch.no_grad()
    def write(self, prompt_BS: Tensor, tokens: int) -> Tensor:
        with self.around(len(prompt_BS)):
            made: Tensor = self.model.generate(
                input_ids=prompt_BS,
                attention_mask=torch.ones_like(prompt_BS),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return made

    @torch.no_grad()
    def logits(self, prompt_BS: Tensor) -> Tensor:
        with self.around(len(prompt_BS)):
            return self.model(input_ids=prompt_BS).logits.float()


def writers(case: Case, folder: Path) -> dict[str, Writer]:
    """Every arm; PEFT is left out where it is not installed."""
    made = {BASE: Writer(case.model().eval())}
    token, token_context = attach(case, settings(case))
    task, task_context = attach(case, task_settings(case))
    made[UNMERGED_TOKEN] = Writer(token.eval(), binder(token_context, case.device))
    made[UNMERGED_TASK] = Writer(task.eval(), binder(task_context, case.device))
    made[MERGED] = Writer(merged(task, task_settings(case), folder).to(case.device).eval())
    for adapted in (token, task):
        lay_out_for_answers(adapted)  # as `moe-medical generate` and `serve` do
    try:
        made[PEFT] = Writer(lora_arm(case, "E*r").model.eval())
    except ImportError:
        LOG.info("%s: not installed", PEFT)
    for writer in made.values():
        writer.model.config.use_cache = True
    return made


def binder(context: RoutingContext, device: torch.device) -> Callable[[int], AbstractContextManager[Any]]:
    return lambda rows: context.bind(BatchInputs.of_rows(torch.zeros(rows, dtype=torch.long, device=device)))


def merged(adapted: nn.Module, config: MoloraConfig, folder: Path) -> nn.Module:
    """The model of task 0, through the files that a user would have."""
    meta = {
        "base_model": EMBEDDED_NAME,
        "base_revision": None,
        "tasks": [f"task {i}" for i in range(TASKS)],
        "label_sets": {},
        "dtype": "float32",
        "system_prompt": None,
        "max_length": 1024,
    }
    state = {name: parameter.detach().cpu() for name, parameter in adapter_parameters(adapted).items()}
    save_adapter(folder / "adapter", state, config, meta)
    (out,) = merge_adapter(folder / "adapter", folder / "merged", tasks=["task 0"], verify=False)
    located = locate_base(ModelSection(name=EMBEDDED_NAME))
    return load_base(BaseModel(str(out), None, out, located.config), "float32")


def measure(
    device: torch.device, batches: tuple[int, ...], tokens: int, more: Callable[[str, float], bool]
) -> Iterator[dict[str, Any]]:
    """A record for each batch size.

    Args:
        device: Of the models.
        batches: Rows.
        tokens: New ones of each row.
        more: Told the batch and what the last round took, says whether there is time for another.
    """
    torch.manual_seed(SEED)
    base = BASES[LARGE]().to(device).requires_grad_(False)
    case = Case(LARGE, base, SHAPE, *batch_of(base, device))
    draw = torch.Generator().manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        arms = writers(case, Path(folder))
        prompts = torch.randint(0, base.config.vocab_size, (max(batches), PROMPT), generator=draw).to(device)
        apart = (arms[MERGED].logits(prompts) - arms[UNMERGED_TASK].logits(prompts)).abs().max()
        for rows in batches:
            record = one_batch(
                arms, prompts[:rows], tokens, device, lambda took, n=rows: more(f"batch {n}", took)
            )
            record["merged_logits_differ_at_most"] = float(apart)
            first = rows == batches[0]
            yield record | {"profile": profiled(arms, prompts[:rows]) if first else None}


def one_batch(
    arms: dict[str, Writer],
    prompt_BS: Tensor,
    tokens: int,
    device: torch.device,
    more: Callable[[float], bool],
) -> dict[str, Any]:
    """Milliseconds of every round by arm, after one that does not count, and tokens per second."""
    for writer in arms.values():
        writer.write(prompt_BS, 2)
    rounds: list[dict[str, dict[str, float]]] = []
    took = 0.0
    while more(took):
        rounds.append(
            {
                name: timed(lambda w=arms[name]: w.write(prompt_BS, tokens), device)
                for name in shifted(arms, len(rounds))
            }
        )
        took = sum(one["wall_ms"] for one in rounds[-1].values()) / 1e3
    made, clock = tokens * len(prompt_BS), "wall_ms" if device.type == "cuda" else "cpu_ms"
    return {
        "shape": str(SHAPE),
        "rows": len(prompt_BS),
        "prompt_tokens": prompt_BS.shape[1],
        "new_tokens": tokens,
        "rounds": len(rounds),
        "tokens_per_second": {n: spread([1e3 * made / one[n]["wall_ms"] for one in rounds]) for n in arms},
        "cpu_ms": {name: spread([one[name]["cpu_ms"] for one in rounds]) for name in arms},
        "ms_of_rounds": {name: [round(one[name][clock], 2) for one in rounds] for name in arms},
    }


def profiled(arms: dict[str, Writer], prompt_BS: Tensor) -> dict[str, Any]:
    """Where the time of a prompt and a few new tokens goes."""
    profiles = profile(
        {name: partial(arm.write, prompt_BS, PROFILED_TOKENS) for name, arm in arms.items()}, times=1
    )
    other = PEFT if PEFT in profiles else BASE
    words = [
        in_words(profiles, arm, other, f"A prompt with {PROFILED_TOKENS} more tokens")
        for arm in (UNMERGED_TASK, UNMERGED_TOKEN)
    ]
    return {"arms": profiles, "in_words": " ".join(words)}


# Where the time goes, of a step too, by groups of operators under torch's profiler

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
