"""MOELoRA-peft (liuqidong07/MOELoRA-peft): PEFT's folder with experts, a task gate and task embeddings.

    adapter_config.json   peft_type MMOELORAS (one gate for the model) or MMOELORA (one for each module);
                          r of all experts together, lora_alpha, expert_num, task_num, task_embedding_dim
    adapter_model.bin
        [base_model.model.MODULE.]lora_task_embedding.weight (task_num + 1, H)    row 0 is padding
        [base_model.model.MODULE.]lora_gate.GateL.weight     (E, H)
        base_model.model.MODULE.lora_A.loraA.I.mlp.weight    (r / E, D)
        base_model.model.MODULE.lora_B.loraB.I.mlp.weight    (F, r / E)

Each expert's `.mlp.weight` is there a second time as `.weight`. Under MMOELORAS every module holds a gate and
an embedding that its forward never uses: those are left out, and named. Task ids count from 1, ours from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from moe_medical.config.adapters import PRESETS
from moe_medical.config.router_kinds import TASK_FEATURES
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.foreign.peft import PREFIX, check_settings
from moe_medical.interop.foreign.source import (
    MAX_EXPERTS,
    WEIGHT_FILES,
    Factors,
    Imported,
    Scale,
    Settings,
    Source,
    TensorReader,
)

SHARED = "MMOELORAS"
EACH = "MMOELORA"
_OWN_KEYS = ("expert_num", "task_num", "task_embedding_dim")
_MODULE = re.compile(r"(?P<module>.+)\.(lora_A\.loraA|lora_B\.loraB|lora_gate|lora_task_embedding)\..+")
_DEAD = re.compile(r".+\.(lora_gate\.GateL\.weight|lora_task_embedding\.weight)")


@dataclass(frozen=True)
class _Gate:
    """Sizes of experts and gates."""

    experts: int
    tasks: int
    features: int
    """H, of a task's embedding."""
    scale: Scale
    """Of the whole rank, which the experts share between them."""

    @classmethod
    def of(cls, settings: Settings) -> _Gate:
        experts = settings.whole("expert_num", most=MAX_EXPERTS)
        rank = settings.whole("r")
        if rank % experts:
            settings.complain("r", f"must be a multiple of expert_num, {experts}", rank)
        return cls(
            experts=experts,
            tasks=settings.whole("task_num"),
            features=settings.whole("task_embedding_dim", TASK_FEATURES, TASK_FEATURES),
            scale=Scale(rank, settings.number("lora_alpha", zero=False)),
        )


def read_moelora(source: Source) -> Imported:
    """A MOELoRA-peft folder -> preset `moelora`."""
    settings = source.settings()
    check_settings(settings, SHARED, EACH, also=_OWN_KEYS)
    settings.must_be_unset("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    gate = _Gate.of(settings)
    shared = settings.text("peft_type") == SHARED
    settings.refuse()
    _check_tasks(source, gate.tasks)
    reader = source.reader(*WEIGHT_FILES)
    names = _expert_modules(reader, source, settings)
    low_rank = _take_experts(reader, source, names, gate)
    if shared:
        routers = {"": _take_gate(reader, "", gate)}
        # Every module is built with a gate and an embedding of its own too, which its forward never uses.
        reader.drop(name for name in reader.tensors if _DEAD.fullmatch(name))
    else:
        routers = {ours: _take_gate(reader, f"{name}.", gate) for ours, name in names.items()}
    reader.refuse()
    config = replace(
        PRESETS["moelora"],
        router_scope="model" if shared else "module",
        num_experts=gate.experts,
        num_tasks=gate.tasks,
        rank=gate.scale.rank,
        alpha=gate.scale.alpha,
        dropout=settings.fraction("lora_dropout"),
        molora=source.layers.patterns(low_rank),
    )
    return Imported(config, low_rank, routers, dropped=reader.dropped)


def _check_tasks(source: Source, count: int) -> None:
    """The folder knows tasks by number only."""
    if len(source.tasks) == count and len(set(source.tasks)) == count:
        return
    fix = "Give --tasks NAME,NAME,... in the order of their ids, which count from 1."
    rule = f"must name the {count} tasks that the gate tells apart, each once"
    raise ConfigError("import", [Problem("--tasks", rule, list(source.tasks), fix)])


def _expert_modules(reader: TensorReader, source: Source, settings: Settings) -> dict[str, str]:
    """Adapted linears of the base, those that the settings or the tensors name -> their foreign names."""
    bare = {name: name.removeprefix(PREFIX) for name in reader.modules(_MODULE)}
    resolved = source.layers.resolve(bare, reader.tensors, reader.source)
    foreign = {ours: name for name, ours in resolved.items()}
    pattern = settings.values.get("target_modules")
    if isinstance(pattern, str):
        wanted = [ours for ours in source.layers.sizes if re.fullmatch(pattern, ours)]
    else:  # its program takes any end of a name, a dot before it or not
        ends = tuple(settings.names("target_modules"))
        wanted = [ours for ours in source.layers.sizes if ours.endswith(ends)]
    return {ours: foreign.get(ours, PREFIX + ours) for ours in dict.fromkeys([*wanted, *foreign])}


def _take_experts(
    reader: TensorReader, source: Source, names: Mapping[str, str], gate: _Gate
) -> dict[str, Factors]:
    rank = gate.scale.rank // gate.experts
    found = {}
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        experts_A = [f"{name}.lora_A.loraA.{i}" for i in range(gate.experts)]
        experts_B = [f"{name}.lora_B.loraB.{i}" for i in range(gate.experts)]
        # An expert's linear layer is a child of it, whose weight is registered as the expert's own too.
        for expert in (*experts_A, *experts_B):
            reader.take_copy(f"{expert}.weight", f"{expert}.mlp.weight")
        A = reader.take_stacked((f"{expert}.mlp.weight" for expert in experts_A), rank, in_features)
        B = reader.take_stacked((f"{expert}.mlp.weight" for expert in experts_B), out_features, rank)
        found[ours] = Factors(A, B, gate.scale)
    return found


def _take_gate(reader: TensorReader, prefix: str, gate: _Gate) -> dict[str, Tensor]:
    """Embedding (tasks, H) and weight (E, H) of a gate, its logits W e."""
    embedding = reader.take(f"{prefix}lora_task_embedding.weight", gate.tasks + 1, gate.features)
    weight = reader.take(f"{prefix}lora_gate.GateL.weight", gate.experts, gate.features)
    # Row 0 pads lists of tasks; theirs count from 1. Zeros fill a narrower H up, and change no logit.
    missing = TASK_FEATURES - gate.features
    return {"embedding": pad(embedding[1:], (0, missing)), "weight": pad(weight, (0, missing))}
