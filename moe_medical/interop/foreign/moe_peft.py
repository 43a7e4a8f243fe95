"""MixLoRA (TUDB-Labs/MixLoRA) and MoE-PEFT (TUDB-Labs/MoE-PEFT): one layout, `adapter_model.bin`.

    PREFIX.layers.N.self_attn.PROJ.lora_A.weight (r, D)            plain LoRA: attention, but for mola
    PREFIX.layers.N.mlp.PROJ.experts.I.lora_A.weight (r, D)        and lora_B (F, r)
    mixlora.layers.N.mlp.moe_gate.weight (E, D)                    one gate for the FFN block
    mola.layers.N.BLOCK.PROJ.moe_gate.weight (E, D)                a gate for each linear; loramoe's MLP too

PREFIX is `mixlora`, `mola` or `loramoe`; a plain LoRA of MoE-PEFT is a PEFT folder. Only modules that
`target_modules` names are there. `expert_lora` gives experts a rank and alpha of their own. The first MixLoRA
folders (`routing_strategy: mixtral`) have `layers.N.gate` and `layers.N.experts.I.w1_proj`.
DoRA is refused: its magnitudes are not saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from moe_medical.config.adapters import PRESETS
from moe_medical.interop.foreign.base_layers import tail_of
from moe_medical.interop.foreign.peft import check_settings
from moe_medical.interop.foreign.source import (
    MAX_EXPERTS,
    WEIGHT_FILES,
    Factors,
    Imported,
    Scale,
    Settings,
    Source,
    TensorReader,
    in_common_scale,
)

PRESET_OF = {"MIXLORA": "mixlora", "MOLA": "mola", "LORAMOE": "lora_moe"}
_OWN_KEYS = (
    "routing_strategy", "num_experts", "top_k", "act_fn", "expert_lora", "router_aux_loss_coef",
    "router_loss", "router_init_range", "jitter_noise", "lora_init", "name", "task_name",
)  # fmt: skip
_EXPERT_KEYS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "lora_init"}
_STRATEGIES = {"MIXLORA": ("mixlora", "mixtral"), "MOLA": ("mola",), "LORAMOE": ("loramoe",)}
_OLD_PROJECTIONS = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_OLD_EXPERT = re.compile(r"(mixlora\.layers\.\d+)\.experts\.(\d+)\.(\w+)\.(lora_[AB]\.weight)")
_OLD_GATE = re.compile(r"(mixlora\.layers\.\d+)\.gate\.weight")
_MODULE = re.compile(r"(?P<module>.+?)(\.experts\.\d+)?\.(lora_[AB]|moe_gate)\.weight")


@dataclass(frozen=True)
class _Kind:
    """What the settings say of one of the three methods."""

    peft_type: str
    experts: int
    top_k: int
    """0 where all experts act."""
    plain: Scale
    routed: Scale
    leaves: frozenset[str]
    """Own names of the adapted linears."""

    @classmethod
    def of(cls, settings: Settings) -> _Kind:
        peft_type = settings.text("peft_type")
        experts = settings.whole("num_experts", most=MAX_EXPERTS)
        leaves = frozenset(_OLD_PROJECTIONS.get(name, name) for name in settings.names("target_modules"))
        if isinstance(settings.values.get("target_modules"), str):
            settings.complain("target_modules", "must be names", settings.values["target_modules"])
        return cls(
            peft_type=peft_type,
            experts=experts,
            top_k=0 if peft_type == "LORAMOE" else settings.whole("top_k", 2, experts),
            plain=_scale(settings),
            routed=_scale(_expert_settings(settings)),
            leaves=leaves,
        )

    def modules(self, source: Source, routed: bool) -> dict[str, str]:
        """Linears of the base with experts, or those with one LoRA -> their foreign names."""
        blocks = ["mlp"] if routed else ["self_attn"]
        if self.peft_type == "MOLA":  # experts everywhere
            blocks = ["mlp", "self_attn"] if routed else []
        found = source.layers.children(blocks, self.leaves)
        return {ours: f"{self.peft_type.lower()}.layers.{tail_of(ours)}" for ours in found}


def read_moe_peft(source: Source) -> Imported:
    """A MixLoRA, MoLA or LoRAMoE folder -> the preset of that name."""
    settings = source.settings()
    kind = _read_kind(settings, source)
    reader = source.reader(*WEIGHT_FILES, renamed=_modern)
    # The folder of another base is refused here, in one line. A block's own gate belongs to no linear layer.
    modules = {name: name for name in reader.modules(_MODULE) if not name.endswith(".mlp")}
    source.layers.resolve(modules, reader.tensors, reader.source)
    routed = kind.modules(source, routed=True)
    plain = kind.modules(source, routed=False)
    low_rank = _take_experts(reader, source, routed, kind) | _take_loras(reader, source, plain, kind)
    routers = _take_gates(reader, source, routed, kind)
    reader.refuse()
    scale, low_rank = in_common_scale(low_rank)
    balance = 0.0 if kind.peft_type == "LORAMOE" else 0.001  # MoE-PEFT's defaults, which its folders lack
    config = replace(
        PRESETS[PRESET_OF[kind.peft_type]],
        num_experts=kind.experts,
        experts_per_layer=(),
        top_k=kind.top_k,
        rank=scale.rank,
        alpha=scale.alpha,
        rs_lora=scale.rs_lora,
        dropout=settings.fraction("lora_dropout"),
        jitter=settings.number("jitter_noise", 0.0),
        balance_coefficient=settings.number("router_aux_loss_coef", balance),
        molora=source.layers.patterns(routed),
        lora=source.layers.patterns(plain),
    )
    return Imported(config, low_rank, routers)


def _read_kind(settings: Settings, source: Source) -> _Kind:
    check_settings(settings, *PRESET_OF, also=_OWN_KEYS)
    settings.must_be("routing_strategy", *_STRATEGIES.get(str(settings.values.get("peft_type")), ()))
    settings.must_be_unset("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform")
    activation = source.layers.activation
    settings.must_be("act_fn", activation, fix=f"{source.layers.name} computes with {activation}.")
    kind = _Kind.of(settings)
    settings.refuse()
    return kind


def _expert_settings(settings: Settings) -> Settings:
    """Those of the experts: the folder's, but for what `expert_lora` says otherwise."""
    own = settings.values.get("expert_lora") or {}
    if not isinstance(own, dict):
        settings.complain("expert_lora", "must be an object", own)
        own = {}
    mine = Settings(settings.path, own, settings.problems)
    mine.must_be("bias", "none")
    mine.must_be_unset(*sorted(own.keys() - _EXPERT_KEYS))
    return Settings(settings.path, {**settings.values, **own}, settings.problems)


def _scale(settings: Settings) -> Scale:
    alpha = settings.number("lora_alpha", zero=False)
    return Scale(settings.whole("r"), alpha, settings.flag("use_rslora"))


def _modern(name: str) -> str:
    """A name of the first layout as today's; any other as it is."""
    if gate := _OLD_GATE.fullmatch(name):
        return f"{gate[1]}.mlp.moe_gate.weight"
    if expert := _OLD_EXPERT.fullmatch(name):
        projection = _OLD_PROJECTIONS.get(expert[3], expert[3])
        return f"{expert[1]}.mlp.{projection}.experts.{expert[2]}.{expert[4]}"
    return name


def _take_experts(
    reader: TensorReader, source: Source, names: Mapping[str, str], kind: _Kind
) -> dict[str, Factors]:
    rank = kind.routed.rank
    found = {}
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        experts = [f"{name}.experts.{i}" for i in range(kind.experts)]
        A = reader.take_stacked((f"{expert}.lora_A.weight" for expert in experts), rank, in_features)
        B = reader.take_stacked((f"{expert}.lora_B.weight" for expert in experts), out_features, rank)
        found[ours] = Factors(A, B, kind.routed)
    return found


def _take_loras(
    reader: TensorReader, source: Source, names: Mapping[str, str], kind: _Kind
) -> dict[str, Factors]:
    rank = kind.plain.rank
    found = {}
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        A = reader.take(f"{name}.lora_A.weight", rank, in_features)
        B = reader.take(f"{name}.lora_B.weight", out_features, rank)
        found[ours] = Factors(A, B, kind.plain)
    return found


def _take_gates(
    reader: TensorReader, source: Source, names: Mapping[str, str], kind: _Kind
) -> dict[str, Mapping[str, Tensor]]:
    """Weight (E, D) of each linear's router; with MixLoRA of each FFN block's, which reads its input."""
    gates: dict[str, Mapping[str, Tensor]] = {}
    for ours, name in names.items():
        width, _ = source.layers.sizes[ours]
        if kind.peft_type == "MIXLORA":
            ours = ours.rpartition(".")[0]
            name = name.rpartition(".")[0]
            width = source.layers.width
        if ours not in gates:  # the linears of a block share its gate
            gates[ours] = {"weight": reader.take(f"{name}.moe_gate.weight", kind.experts, width)}
    return gates
