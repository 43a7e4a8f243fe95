"""MOELoRA-peft (liuqidong07/MOELoRA-peft): PEFT's folder with experts, a task gate and task embeddings.

    adapter_config.json   peft_type MMOELORAS (one gate for the model) or MMOELORA (one for each module);
                          r of all experts together, lora_alpha, expert_num, task_num, task_embedding_dim
    adapter_model.bin
        [base_model.model.MODULE.]lora_task_embedding.weight (task_num + 1, H)    row 0 is padding
        [base_model.model.MODULE.]lora_gate.GateL.weight     (E, H)
        base_model.model.MODULE.lora_A.loraA.I.mlp.weight    (r / E, D)
        base_model.model.MODULE.lora_B.loraB.I.mlp.weight    (F, r / E)

Each expert's `.mlp.weight` is there a second time as `.weight`. Under MMOELORAS every module holds a gate and
an embedding that its forward never uses: those are dropped and told of. Task ids count from 1, ours from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from moe_medical.config.presets import PRESETS, TASK_FEATURES
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.foreign.ledger import Ledger
from moe_medical.interop.foreign.parts import WEIGHT_FILES, Imported, Source, stack
from moe_medical.interop.foreign.peft import PREFIX, check_settings
from moe_medical.interop.foreign.scale import LowRank, Scale
from moe_medical.interop.foreign.settings import Settings

SHARED, EACH = "MMOELORAS", "MMOELORA"
MAX_EXPERTS = 1024
_OWN_KEYS = ("expert_num", "task_num", "task_embedding_dim")
_MODULE = re.compile(r"(?P<module>.+)\.(lora_A\.loraA|lora_B\.loraB|lora_gate|lora_task_embedding)\..+")
_DEAD = re.compile(r".+\.(lora_gate\.GateL\.weight|lora_task_embedding\.weight)")


@dataclass(frozen=True)
class _Gate:
    """Sizes of experts and gates."""

    experts: int
    tasks: int
    features: int
    scale: Scale
    """Of the whole rank."""

    @property
    def expert_rank(self) -> int:
        return self.scale.rank // self.experts

    @classmethod
    def of(cls, settings: Settings) -> _Gate:
        experts, rank = settings.whole("expert_num", most=MAX_EXPERTS), settings.whole("r")
        if rank % experts:
            settings.complain("r", f"must be a multiple of expert_num, {experts}", rank)
        features = settings.whole("task_embedding_dim", TASK_FEATURES, TASK_FEATURES)
        scale = Scale(rank, settings.number("lora_alpha", zero=False))
        return cls(experts, settings.whole("task_num"), features, scale)


def read_moelora(source: Source) -> Imported:
    """A MOELoRA-peft folder -> preset `moelora`."""
    settings = source.settings()
    check_settings(settings, SHARED, EACH, also=_OWN_KEYS)
    settings.must_be_unset("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    gate, shared = _Gate.of(settings), settings.text("peft_type") == SHARED
    settings.refuse()
    _check_tasks(source, gate.tasks)
    ledger = source.ledger(source.tensors(*WEIGHT_FILES))
    names = _modules(ledger, source, settings)
    low_rank = {ours: _take_experts(ledger, name, source, ours, gate) for ours, name in names.items()}
    if shared:
        routers = {"": _take_gate(ledger, "", gate)}
        ledger.drop(name for name in ledger.tensors if _DEAD.fullmatch(name))
    else:
        routers = {ours: _take_gate(ledger, f"{name}.", gate) for ours, name in names.items()}
    ledger.refuse()
    config = replace(
        PRESETS["moelora"],
        router_scope="model" if shared else "module",
        num_experts=gate.experts,
        num_tasks=gate.tasks,
        rank=gate.scale.rank,
        alpha=gate.scale.alpha,
        dropout=settings.share("lora_dropout"),
        molora=source.layers.patterns(low_rank),
    )
    return Imported(config, low_rank, routers, dropped=ledger.dropped)


def _check_tasks(source: Source, count: int) -> None:
    """The folder knows tasks by number only."""
    if len(source.tasks) == count and len(set(source.tasks)) == count:
        return
    fix = "Give --tasks NAME,NAME,... in the order of their ids, which count from 1."
    rule = f"must name the {count} tasks that the gate tells apart, each once"
    raise ConfigError("import", [Problem("--tasks", rule, list(source.tasks), fix)])


def _modules(ledger: Ledger, source: Source, settings: Settings) -> dict[str, str]:
    """Adapted linears of the base -> their foreign names; its program matches ends of names, dot or not."""
    matches = (_MODULE.fullmatch(name) for name in ledger.tensors)
    names = dict.fromkeys(match["module"] for match in matches if match)
    bare = {name: name.removeprefix(PREFIX) for name in names}
    resolved = source.layers.resolve(bare, ledger.tensors, ledger.source)
    foreign = {ours: name for name, ours in resolved.items()}
    wanted = [ours for ours in source.layers.sizes if _is_target(settings, ours)]
    return {ours: foreign.get(ours, PREFIX + ours) for ours in dict.fromkeys([*wanted, *foreign])}


def _is_target(settings: Settings, name: str) -> bool:
    pattern = settings.values.get("target_modules")
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return name.endswith(tuple(settings.names("target_modules")))


def _take_experts(ledger: Ledger, name: str, source: Source, ours: str, gate: _Gate) -> LowRank:
    in_features, out_features = source.layers.sizes[ours]
    A, B = f"{name}.lora_A.loraA", f"{name}.lora_B.loraB"
    for i in range(gate.experts):
        for side in (A, B):
            ledger.take_copy(f"{side}.{i}.weight", f"{side}.{i}.mlp.weight")
    each = range(gate.experts)
    return LowRank(
        stack([ledger.take(f"{A}.{i}.mlp.weight", gate.expert_rank, in_features) for i in each]),
        stack([ledger.take(f"{B}.{i}.mlp.weight", out_features, gate.expert_rank) for i in each]),
        gate.scale,
    )


def _take_gate(ledger: Ledger, prefix: str, gate: _Gate) -> Mapping[str, Tensor]:
    """Without the padding's row; narrower embeddings are filled up with zeros, which change no logit."""
    embedding = ledger.take(f"{prefix}lora_task_embedding.weight", gate.tasks + 1, gate.features)
    weight = ledger.take(f"{prefix}lora_gate.GateL.weight", gate.experts, gate.features)
    missing = TASK_FEATURES - gate.features
    return {"embedding": F.pad(embedding[1:], (0, missing)), "weight": F.pad(weight, (0, missing))}
