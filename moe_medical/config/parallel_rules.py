"""What cannot be right between ranks: expert parallelism, and a DeepSpeed JSON that contradicts the run.

DeepSpeed accepts much that it then ignores, gets silently wrong, or fails at once the ranks are up. What is
refused here was seen to do so with 0.19.8, or could not be tried; each rule says which. Of what passes,
tests/distributed/test_deepspeed_settings.py has the less usual.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.deepspeed import (
    OFFLOAD_KEYS,
    RUN_FILE_OWNS,
    TOP_LEVEL_KEYS,
    ZERO_COUNTS,
    ZERO_FLAGS,
    ZERO_KEYS,
    offloads,
)
from moe_medical.config.schema import ParallelSection
from moe_medical.errors import Problem


def expert_parallel_problems(parallel: ParallelSection, adapters: MoloraConfig) -> Iterator[Problem]:
    """Whether the experts can be spread over `ep_size` ranks."""
    ep_size = parallel.ep_size
    if ep_size <= 1 or adapters.num_experts < 1 or parallel.ranks < 1:  # what is below 1 is told elsewhere
        return
    if not adapters.molora or adapters.num_experts == 1:
        yield Problem("parallel.ep_size", "must be 1: no layer has several experts", ep_size)
        return
    near = nearest_ep_size(ep_size, adapters.num_experts, parallel.ranks)
    for what, number in (("adapters.num_experts", adapters.num_experts), ("parallel.ranks", parallel.ranks)):
        if number % ep_size:
            yield Problem("parallel.ep_size", f"must divide {what} ({number})", ep_size, f"Try {near}.")


def nearest_ep_size(ep_size: int, num_experts: int, ranks: int) -> int:
    """The closest that divides experts and ranks; the larger of two."""
    common = math.gcd(num_experts, ranks)
    return min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: (abs(d - ep_size), -d))


def deepspeed_problems(parallel: ParallelSection) -> Iterator[Problem]:
    """Whether the DeepSpeed JSON can be read and fits the run."""
    path = Path(parallel.deepspeed)
    try:
        settings = json.loads(path.read_text())
    except OSError as e:
        found = f"{path} ({e.strerror})"
        yield Problem("parallel.deepspeed", "must name a DeepSpeed JSON, relative to the run file", found)
        return
    except ValueError as e:
        yield Problem("parallel.deepspeed", f"must name valid JSON ({e})", str(path))
        return
    if not isinstance(settings, dict):
        yield Problem("parallel.deepspeed", "must name a JSON object", str(path))
        return
    for key, owner in RUN_FILE_OWNS.items():
        if key in settings:
            yield Problem(f"{path}: {key}", f"is owned by the run file's {owner}", fix="Remove it there.")
    rule = "is not a DeepSpeed key for use beside a run file"
    yield from _unknown(f"{path}: ", settings.keys() - RUN_FILE_OWNS.keys(), TOP_LEVEL_KEYS, rule)
    yield from _zero(path, settings, parallel)


def _zero(path: Path, settings: Mapping[str, Any], parallel: ParallelSection) -> Iterator[Problem]:
    where = f"{path}: zero_optimization"
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield Problem(where, "must be an object", zero)
        return
    yield from _unknown(f"{where}.", zero, ZERO_KEYS, "is not a key of zero_optimization")
    wrong = [*_wrong_values(where, zero)]
    yield from wrong
    if not wrong:
        case = _Case(zero.get("stage", 0), parallel.ep_size, parallel.ranks)
        plain = {key: value for key, value in settings.items() if key != "zero_optimization"}
        yield from _broken(f"{path}: ", plain, _TOP_LEVEL_RULES, case)
        yield from _broken(f"{where}.", zero, _ZERO_RULES, case)
        yield from _offload(path, settings, zero, case)


def _wrong_values(where: str, zero: Mapping[str, Any]) -> Iterator[Problem]:
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        yield Problem(f"{where}.stage", "must be 0, 1, 2 or 3", stage)
    for key, value in zero.items():
        if key in ZERO_FLAGS and type(value) is not bool:
            yield Problem(f"{where}.{key}", "must be true or false", value)
        if key in ZERO_COUNTS and not _is_count(value):
            yield Problem(f"{where}.{key}", "must be a whole number, not negative", value)
        if key in OFFLOAD_KEYS and not isinstance(value, dict):
            yield Problem(f"{where}.{key}", "must be an object", value)


def _is_count(value: Any) -> bool:
    """DeepSpeed takes 5e8, which JSON reads as a float, for a whole number."""
    return type(value) in (int, float) and value >= 0 and math.isfinite(value) and value == int(value)


@dataclass(frozen=True)
class _Case:
    """What a rule may depend on beside the value."""

    stage: int
    ep_size: int
    ranks: int


@dataclass(frozen=True)
class _Rule:
    key: str
    is_broken: Callable[[Any, _Case], bool]
    text: str
    fix: str = ""


def _broken(
    where: str, settings: Mapping[str, Any], rules: Iterable[_Rule], case: _Case
) -> Iterator[Problem]:
    for rule in rules:
        for key in (rule.key, f"stage3_{rule.key}"):  # DeepSpeed's alias
            if key in settings and rule.is_broken(settings[key], case):
                yield Problem(f"{where}{key}", rule.text, settings[key], rule.fix)


def _always(_value: Any, _case: _Case) -> bool:
    return True


def _set(value: Any, _case: _Case) -> bool:
    return bool(value)


_TOP_LEVEL_RULES = (
    _Rule("prescale_gradients", lambda v, c: v and c.stage >= 2, "must be false: ZeRO-2 and 3 refuse it"),
    _Rule(
        "gradient_predivide_factor",
        lambda v, c: v != 1 and c.stage >= 2,
        "must be 1: ZeRO-2 and 3 refuse it, or get gradients wrong where reduce_scatter is off",
    ),
    _Rule(
        "gradient_predivide_factor",
        lambda v, c: type(v) not in (int, float) or not v > 0,
        "must be a number > 0",
    ),
)
_ZERO_RULES = (
    _Rule("cpu_offload", _always, "is outdated", "Use offload_optimizer."),
    _Rule("cpu_offload_param", _always, "is outdated", "Use offload_param."),
    _Rule("cpu_offload_use_pin_memory", _always, "is outdated", "Use pin_memory in offload_optimizer."),
    _Rule("legacy_stage1", _set, "must be false: DeepSpeed has dropped it"),
    _Rule("zenflow", _always, "is not supported: it starts with no stage and optimizer of a run"),
    _Rule("leaf_module", _always, "is not supported: ZeRO-3 then fails in backward of adapted layers"),
    _Rule(
        "module_granularity_threshold",
        lambda v, c: v > 0 and c.stage == 3,
        "must be 0: ZeRO-3 then fails in backward of adapted layers",
    ),
    _Rule("reduce_bucket_size", lambda v, c: v < 1, "must be at least 1"),
    _Rule("allgather_bucket_size", lambda v, c: v % 2 == 1 and c.stage in (1, 2), "must be even"),
    _Rule(
        "compute_grad_norm",
        lambda v, c: not v,
        "must be true: every step logs the norm and clips with it",
    ),
    _Rule(
        "round_robin_gradients",
        lambda v, c: v and c.stage in (1, 2),
        "must be false at ZeRO-1 and 2: tensors are then read back wrong, and so saved wrong",
    ),
    _Rule(
        "contiguous_gradients",
        lambda v, c: not v and c.stage in (1, 2) and c.ep_size > 1,
        "must be true at ZeRO-1 and 2 beside ep_size > 1: gradients are silently wrong without",
    ),
    _Rule(
        "reduce_scatter",
        lambda v, c: not v and c.stage in (1, 2) and c.ep_size > 1,
        "must be true at ZeRO-1 and 2 beside ep_size > 1: DeepSpeed refuses to start without",
    ),
    _Rule(
        "zero_hpz_partition_size",
        lambda v, c: v > 1 and c.ep_size > 1,
        "must be 1 beside ep_size > 1: the experts have partitions of their own",
    ),
    _Rule(
        "zero_hpz_partition_size",
        lambda v, c: v > 1 and c.stage < 3,
        "needs ZeRO-3 and is ignored without",
    ),
    _Rule(
        "zero_hpz_partition_size",
        lambda v, c: v > 1 and c.ranks % v != 0,
        "must divide the number of ranks",
    ),
    *(
        _Rule(f"zero_quantized_{what}", _set, "must be false: it rounds what travels, and is untested here")
        for what in ("weights", "nontrainable_weights", "gradients")
    ),
)
_OFFLOAD_RULES = (
    _Rule("device", lambda v, c: v not in ("cpu", "none"), "must be cpu or none: NVMe is not supported"),
    _Rule("ratio", lambda v, c: v != 1, "must be 1: less needs DeepSpeed's own CPU Adam"),
    _Rule("super_offload", _set, "must be false: it needs DeepSpeed's own CPU Adam"),
)


def _offload(
    path: Path, settings: Mapping[str, Any], zero: Mapping[str, Any], case: _Case
) -> Iterator[Problem]:
    lowest = {"offload_optimizer": 1, "offload_param": 3}
    for section in (name for name in OFFLOAD_KEYS if name in zero):
        where = f"{path}: zero_optimization.{section}"
        yield from _unknown(f"{where}.", zero[section], OFFLOAD_KEYS[section], f"is not a key of {section}")
        yield from _broken(f"{where}.", zero[section], _OFFLOAD_RULES, case)
        if offloads(settings, section) and case.stage < lowest[section]:
            fix = f"Use stage {lowest[section]} or remove it."
            yield Problem(where, f"is ignored at ZeRO-{case.stage}", fix=fix)
    forced = settings.get("zero_force_ds_cpu_optimizer", True) is not False
    if forced and offloads(settings, "offload_optimizer"):
        rule = "must be false beside offload_optimizer: the optimizer is torch's AdamW at every stage"
        found = settings.get("zero_force_ds_cpu_optimizer")
        yield Problem(f"{path}: zero_force_ds_cpu_optimizer", rule, found)


def _unknown(prefix: str, keys: Iterable[str], known: Set[str], rule: str) -> Iterator[Problem]:
    for key in sorted(set(keys) - known):
        close = difflib.get_close_matches(key, sorted(known), n=1)
        yield Problem(f"{prefix}{key}", rule, fix=f"Did you mean {close[0]!r}?" if close else "")
