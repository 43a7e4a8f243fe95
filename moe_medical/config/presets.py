"""Published systems as adapter settings: a preset fills every field that the run file leaves open.

Sources, with the released code's values where paper and code differ: ming_moe MING-MOE (arXiv 2404.09027);
moelora MOELoRA (arXiv 2310.18339); med_moe Med-MoE (EMNLP Findings 2024); hydralora HydraLoRA (arXiv
2404.19245); mixlora MixLoRA (arXiv 2404.15159); lora_moe LoRAMoE (arXiv 2312.09979); mola MoLA (arXiv
2402.08562); adamole AdaMoLE (arXiv 2405.00361); xlora X-LoRA (arXiv 2402.07148); lora LoRA (arXiv
2106.09685), the control arm. Ranks that a system's users choose are ours: 16 with alpha 32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moe_medical.config.router_kinds import ROUTER_KINDS, RouterKind
from moe_medical.config.schema import AdaptersSection

FFN = r".*\.(mlp|feed_forward|ffn)\.\w+"
ATTENTION = r".*\.(self_attn|attn|attention|self_attention)\.\w+"
EVERY_SECOND_FFN = r".*\.\d*[02468]\.(mlp|feed_forward|ffn)\.\w+"


@dataclass(frozen=True)
class MoloraConfig:
    """Adapter settings with every field decided; `AdaptersSection` says what each means.

    Saved with each adapter and checkpoint. Where to start from (`experts_from`, `router_from`) is no part of
    it: that is in the weights by then.
    """

    preset: str = "ming_moe"
    experts: str = "linear"
    router: str = "token"
    router_scope: str = "module"
    router_bias: bool = True
    num_tasks: int = 0
    """Tasks that a task or joint router tells apart; 0 under others."""
    labels: tuple[str, ...] = ()
    """What the experts of a fitted router stand for, in their order."""
    num_experts: int = 8
    experts_per_layer: tuple[int, ...] = ()
    top_k: int = 2
    """0 for all."""
    renormalise: bool = True
    selection: str = "top_k"
    temperature: float = 1.0
    jitter: float = 0.0
    groups: int = 1
    unknown_task: str = "mean"
    freeze_router: bool = False
    rank: int = 16
    rank_split: bool = False
    shared_a: bool = False
    shared_experts: int = 0
    shared_weight: float = 1.0
    learn_shared_weight: bool = False
    alpha: float = 32.0
    rs_lora: bool = False
    dora: bool = False
    init_std: float = 0.0
    dropout: float = 0.05
    freeze_experts: bool = False
    path: str = "auto"
    molora: tuple[str, ...] = (FFN,)
    lora: tuple[str, ...] = (ATTENTION,)
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0
    entropy_coefficient: float = 0.0
    divergence_coefficient: float = 0.0
    localized_coefficient: float = 0.0
    localized_delta: float = 0.1
    localized_tasks: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """Of the delta of an adapter; of the whole rank where it is split."""
        return self.alpha / (self.rank**0.5 if self.rs_lora else self.rank)

    @property
    def router_kind(self) -> RouterKind:
        """What is true of its router, whatever the settings."""
        return ROUTER_KINDS[self.router]

    def not_under_zero3(self) -> list[str]:
        """Settings that need whole weights, or one router on many layers: not with parameters in parts."""
        routed = bool(self.molora)
        found = {
            "experts: ffn": routed and self.experts == "ffn",
            "dora: true": self.dora,
            f"router: {self.router}": routed and self.router_kind.decides_per == "text",
            "freeze_router: true": self.freeze_router,
            "freeze_experts: true": self.freeze_experts,
            "router_scope: model": routed and self.router_scope == "model",
        }
        return [setting for setting, used in found.items() if used]

    def not_spread(self) -> list[str]:
        """Settings with which experts cannot be spread over ranks."""
        found = {
            f"experts: {self.experts}": self.experts != "linear",
            "shared_a: true": self.shared_a,
            "experts_per_layer": bool(self.experts_per_layer),
            f"router: {self.router}": self.router_kind.decides_per == "text",
            "freeze_experts: true": self.freeze_experts,
        }
        return [setting for setting, used in found.items() if used and self.molora]

    @property
    def max_experts(self) -> int:
        """Experts of the layer that has most."""
        return max(self.experts_per_layer, default=self.num_experts)

    def experts_in(self, layer: int, num_layers: int) -> int:
        """Routed experts of a module in decoder layer `layer`: equal bands of layers share a number."""
        bands = self.experts_per_layer
        return bands[min(layer, num_layers - 1) * len(bands) // num_layers] if bands else self.num_experts

    def at_depth(self, layer: int, num_layers: int) -> MoloraConfig:
        """The settings of one layer: its own number of experts, and top-k within it."""
        experts = self.experts_in(layer, num_layers)
        return replace(self, num_experts=experts, experts_per_layer=(), top_k=self.active(experts))

    def active(self, num_experts: int | None = None) -> int:
        """Routed experts that a token uses, of so many."""
        experts = num_experts or self.max_experts
        return min(self.top_k or experts, experts)

    def expert_rank(self, num_experts: int | None = None) -> int:
        """Rank of one expert, where there are so many."""
        return self.rank // (num_experts or self.num_experts) if self.rank_split else self.rank


_DENSE: dict[str, Any] = {"top_k": 0, "router_bias": False, "lora": ()}

PRESETS: dict[str, MoloraConfig] = {
    "ming_moe": MoloraConfig(),
    "lora": MoloraConfig(preset="lora", num_experts=1, top_k=1, molora=(), lora=(FFN, ATTENTION)),
    "moelora": MoloraConfig(
        preset="moelora",
        router="task",
        router_scope="model",
        top_k=0,
        rank_split=True,
        init_std=0.01,
        dropout=0.1,
        molora=(FFN, ATTENTION),
        lora=(),
    ),
    "med_moe": MoloraConfig(
        preset="med_moe",
        experts="ffn",
        router_scope="model",
        freeze_router=True,
        num_experts=4,
        top_k=1,
        renormalise=False,
        shared_experts=1,
        dropout=0.0,
        molora=(EVERY_SECOND_FFN,),
        lora=(),
    ),
    "hydralora": MoloraConfig(preset="hydralora", num_experts=2, shared_a=True, **_DENSE),
    "mixlora": MoloraConfig(
        preset="mixlora", experts="block", router_scope="block", router_bias=False, balance_coefficient=0.01
    ),
    "lora_moe": MoloraConfig(preset="lora_moe", rank=4, **_DENSE),
    "mola": MoloraConfig(
        preset="mola",
        experts_per_layer=(2, 4, 6, 8),
        rank=8,
        alpha=16.0,
        router_bias=False,
        balance_coefficient=0.001,
        molora=(FFN, ATTENTION),
        lora=(),
    ),
    "adamole": MoloraConfig(
        preset="adamole",
        router="threshold",
        top_k=0,
        router_bias=False,
        balance_coefficient=0.001,
        molora=(FFN, ATTENTION),
        lora=(),
    ),
    "xlora": MoloraConfig(
        preset="xlora", router="xlora", top_k=0, freeze_experts=True, molora=(FFN, ATTENTION), lora=()
    ),
}


def resolve_adapters(section: AdaptersSection, num_tasks: int = 0) -> MoloraConfig:
    """The preset with the section's own values on top.

    Args:
        section: Of the run file.
        num_tasks: Of the mixture, which a router that knows tasks needs.
    """
    given: dict[str, Any] = {}
    for key, value in ((f.name, getattr(section, f.name)) for f in fields(section)):
        if value is not None and key in _DECIDED:
            given[key] = tuple(value) if isinstance(value, list) else value
    if "num_experts" in given and "experts_per_layer" not in given:
        given["experts_per_layer"] = ()
    resolved = replace(PRESETS[section.preset], **given)
    return replace(resolved, num_tasks=num_tasks) if resolved.router_kind.knows_tasks else resolved


def lasting_sources(section: AdaptersSection, adapters: MoloraConfig) -> AdaptersSection:
    """The section with those folders only that a resumed run reads again: checkpoints hold the rest."""
    router = section.router_from if adapters.freeze_router else None
    experts = section.experts_from if adapters.freeze_experts else None
    return replace(section, router_from=router, experts_from=experts)


_DECIDED = frozenset(asdict(MoloraConfig()))
