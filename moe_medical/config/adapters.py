"""Adapter settings: which linears get low-rank experts, and how these are routed; published systems as rows.

A run file names a preset and what differs from it; `load.py` puts the two together, once. Nothing behind it
asks for a preset again.

Sources, with the released code's values where paper and code differ: ming_moe MING-MOE (arXiv 2404.09027);
moelora MOELoRA (arXiv 2310.18339); med_moe Med-MoE (EMNLP Findings 2024); hydralora HydraLoRA (arXiv
2404.19245); mixlora MixLoRA (arXiv 2404.15159); lora_moe LoRAMoE (arXiv 2312.09979); mola MoLA (arXiv
2402.08562); adamole AdaMoLE (arXiv 2405.00361); xlora X-LoRA (arXiv 2402.07148); lora LoRA (arXiv
2106.09685), the control arm. Ranks that a system's users choose are ours: 16 with alpha 32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

from moe_medical.config.ranges import NOT_NEGATIVE, POSITIVE, SHARE, within
from moe_medical.config.router_kinds import ROUTER_KINDS, RouterKind

RouterScope = Literal["module", "block", "layer", "model"]
Experts = Literal["linear", "block", "ffn"]
Selection = Literal["top_k", "sample"]
ComputePath = Literal["auto", "concat", "grouped", "triton"]

FFN = r".*\.(mlp|feed_forward|ffn)\.\w+"
ATTENTION = r".*\.(self_attn|attn|attention|self_attention)\.\w+"
EVERY_SECOND_FFN = r".*\.\d*[02468]\.(mlp|feed_forward|ffn)\.\w+"

DERIVED = {"derived": True}
"""Metadata of a field that follows from the data, so that no run file has it."""
SOURCE = {"source": True}
"""Metadata of a field that says where values start from. It is not saved: what is has those values."""


@dataclass(frozen=True)
class MoloraConfig:
    """Adapter settings, each of them decided. Saved with each adapter and checkpoint, but for the sources."""

    preset: str = "ming_moe"
    experts: Experts = "linear"
    """`linear`: low-rank experts in each linear layer; `block`: low-rank experts of a whole FFN block, each
    with its own activations (MixLoRA); `ffn`: full copies of the FFN block (Med-MoE)."""
    router: str = "token"
    """`token`: each token chooses; `task`: each task has its own weights; `joint`: both logits added;
    `sequence`: the prompt chooses for all its tokens; `threshold`: experts above a learned threshold;
    `hierarchical`: a softmax over groups, then within each; `xlora`: gates from a pass without adapters."""
    router_scope: RouterScope = "module"
    """Modules that share one decision: each linear its own, those of one block, those of one layer; `model`
    shares the router's weights between all layers too."""
    router_bias: bool = True
    num_tasks: int = field(default=0, metadata=DERIVED)
    """Tasks that a router which knows tasks tells apart; 0 under others."""
    labels: tuple[str, ...] = field(default=(), metadata=DERIVED)
    """What the experts of a fitted router stand for, in their order."""
    num_experts: int = field(default=8, metadata=POSITIVE)
    experts_per_layer: tuple[int, ...] = field(default=(), metadata=within("must be > 0", lambda n: n > 0))
    """Experts by depth, in equal bands of layers (MoLA), instead of `num_experts` everywhere."""
    top_k: int = 2
    """Experts that each token, or task, uses; 0 for all, a dense gate."""
    renormalise: bool = True
    """Whether the gates of the chosen experts sum to 1; else they are their shares of the full softmax."""
    selection: Selection = "top_k"
    """Of the chosen in training: the largest, or a sample without replacement; elsewhere the largest."""
    temperature: float = field(default=1.0, metadata=POSITIVE)
    """Divides the router's logits."""
    jitter: float = field(default=0.0, metadata=SHARE)
    """In training the router's input is multiplied by U(1 - jitter, 1 + jitter)."""
    groups: int = field(default=1, metadata=POSITIVE)
    """Groups of experts of a hierarchical router."""
    unknown_task: str = "mean"
    """What a task gate does without a task: `mean` of the tasks' logits, `refuse`, or as the task named."""
    freeze_router: bool = False
    """Keep the router as it was loaded from `router_from`."""
    rank: int = field(default=16, metadata=POSITIVE)
    rank_split: bool = False
    """Whether `rank` is that of all experts together (MOELoRA) rather than of each."""
    shared_a: bool = False
    """One A for all experts, each with its own B (HydraLoRA)."""
    shared_experts: int = field(default=0, metadata=NOT_NEGATIVE)
    """Experts that every token uses beside those it chose (the meta expert of Med-MoE)."""
    shared_weight: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Gate of the shared experts."""
    learn_shared_weight: bool = False
    """Whether that gate is trained."""
    alpha: float = field(default=32.0, metadata=POSITIVE)
    """Scaling of the delta is alpha / rank, or alpha / sqrt(rank) with `rs_lora`."""
    rs_lora: bool = False
    """Rank-stabilised scaling."""
    dora: bool = False
    """Weight-decomposed plain LoRA (layers of `lora` only: a token's gate would change the norm)."""
    init_std: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """A starts normal with this deviation; 0 is kaiming-uniform. B starts at zero."""
    dropout: float = field(default=0.05, metadata=SHARE)
    freeze_experts: bool = False
    """Train routers and what shares no name with an expert only (X-LoRA)."""
    path: ComputePath = "auto"
    """How experts are computed: all at once, chosen ones grouped, fused kernels; `auto` decides by layer."""
    molora: tuple[str, ...] = (FFN,)
    """Regular expressions; a linear whose full module name matches one gets routed experts. With `experts:
    block` or `ffn` they name the FFN blocks' linears, and each block is adapted whole."""
    lora: tuple[str, ...] = (ATTENTION,)
    """Regular expressions; a linear whose full module name matches one gets one plain LoRA."""
    balance_coefficient: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of the load-balance loss E * sum_i f_i P_i, averaged over layers."""
    z_coefficient: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of the router z-loss mean(logsumexp(logits)^2), averaged over layers."""
    entropy_coefficient: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of the mean entropy of a token's softmax, averaged over layers: decided gates."""
    divergence_coefficient: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of minus the generalised Jensen-Shannon divergence of the tokens' softmaxes (HMoRA)."""
    localized_coefficient: float = field(default=0.0, metadata=NOT_NEGATIVE)
    """Weight of LoRAMoE's localized balance: the squared coefficient of variation of weighted gates."""
    localized_delta: float = field(default=0.1, metadata=SHARE)
    """Its weights are 1 + delta where task and expert are of one kind, else 1 - delta."""
    localized_tasks: tuple[str, ...] = ()
    """Tasks of the first kind, whose experts are the first half; all others are of the second."""
    experts_from: tuple[str, ...] = field(default=(), metadata=SOURCE)
    """Adapter folders to start from: one plain LoRA that all experts copy, or one for each expert."""
    start_noise: Optional[float] = field(default=None, metadata=SOURCE)
    """Deviation of the noise on copies of one LoRA, relative to theirs: alike they would stay alike."""
    router_from: Optional[str] = field(default=None, metadata=SOURCE)
    """Folder of a fitted router, with its label map (`moe-medical router fit`)."""

    def __post_init__(self) -> None:
        for of in dataclasses.fields(self):  # YAML and JSON have lists only
            value = getattr(self, of.name)
            if isinstance(value, list):
                object.__setattr__(self, of.name, tuple(value))

    def saved(self) -> dict[str, Any]:
        """Field -> value, without where the values started from."""
        return {f.name: getattr(self, f.name) for f in saved_fields()}

    def for_tasks(self, num_tasks: int, labels: tuple[str, ...] = ()) -> MoloraConfig:
        """The settings once the data is known.

        Args:
            num_tasks: Of the mixture.
            labels: Of the fitted router, if there is one.
        """
        return replace(self, num_tasks=num_tasks if self.router_kind.knows_tasks else 0, labels=labels)

    def lasting(self) -> MoloraConfig:
        """With those sources only that a resumed run reads again: checkpoints hold what is trained."""
        return replace(
            self,
            router_from=self.router_from if self.freeze_router else None,
            experts_from=self.experts_from if self.freeze_experts else (),
        )

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

    def idle_router(self) -> str:
        """Why the routers will stay as they were drawn, and what to do; empty where they learn.

        A single expert whose gate is renormalised has the gate 1 whatever the logits: no gradient of the
        language model's loss comes to the router.
        """
        gate_is_one = self.active() == 1 and (self.renormalise or self.max_experts == 1)
        coefficients = ("balance", "z", "entropy", "divergence", "localized")
        has_loss = any(getattr(self, f"{name}_coefficient") for name in coefficients)
        if not self.molora or self.freeze_router or not gate_is_one or has_loss:
            return ""
        if self.max_experts == 1:
            return (
                "routers will stay as they were drawn: each has one expert. Use plain LoRA (adapters.lora)."
            )
        return (
            "routers will stay as they were drawn: the gate of one expert is always 1, and no router loss "
            "is on. Set adapters.renormalise=false, or a loss such as adapters.balance_coefficient=0.01."
        )

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


def saved_fields() -> list[dataclasses.Field[Any]]:
    """Of `MoloraConfig`: those that an adapter's folder and a run's fingerprint have."""
    return [f for f in dataclasses.fields(MoloraConfig) if "source" not in f.metadata]


def run_file_keys() -> list[str]:
    """Of `MoloraConfig`: those that a run file may have."""
    return [f.name for f in dataclasses.fields(MoloraConfig) if "derived" not in f.metadata]


def preset_for(given: Mapping[str, Any]) -> MoloraConfig:
    """What settings start from that a run file gives; an unknown preset is told by the rules.

    Args:
        given: Of the run file's section, without nulls.
    """
    preset = PRESETS.get(given.get("preset", "ming_moe"), MoloraConfig())
    if "num_experts" in given and "experts_per_layer" not in given:
        return replace(preset, experts_per_layer=())  # one number for all layers is meant
    return preset
