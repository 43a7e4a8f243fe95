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

from moe_medical.config.presets import PRESETS
from moe_medical.interop.foreign.ledger import Ledger
from moe_medical.interop.foreign.parts import WEIGHT_FILES, Imported, Source, stack
from moe_medical.interop.foreign.peft import check_settings
from moe_medical.interop.foreign.scale import LowRank, Scale, common_scale
from moe_medical.interop.foreign.settings import Settings
from moe_medical.interop.foreign.source import tail_of

PRESET_OF = {"MIXLORA": "mixlora", "MOLA": "mola", "LORAMOE": "lora_moe"}
MAX_EXPERTS = 1024
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
    """One folder's settings."""

    peft_type: str
    experts: int
    top_k: int
    plain: Scale
    routed: Scale
    leaves: frozenset[str]
    """Own names of the adapted linears."""

    @property
    def prefix(self) -> str:
        """Of the names of its modules."""
        return self.peft_type.lower()

    @property
    def routed_blocks(self) -> tuple[str, ...]:
        """Whose linears have experts."""
        return ("mlp", "self_attn") if self.peft_type == "MOLA" else ("mlp",)

    @property
    def plain_blocks(self) -> tuple[str, ...]:
        """Whose linears have one LoRA."""
        return () if self.peft_type == "MOLA" else ("self_attn",)


def read_moe_peft(source: Source) -> Imported:
    """A MixLoRA, MoLA or LoRAMoE folder -> the preset of that name."""
    settings = source.settings()
    kind = _read_kind(settings, source)
    ledger = source.ledger(_renamed(source.tensors(*WEIGHT_FILES)))
    _check_modules(ledger, source)
    routed = _find(source, kind, kind.routed_blocks)
    plain = _find(source, kind, kind.plain_blocks)
    low_rank = {ours: _take_experts(ledger, name, source, ours, kind) for ours, name in routed.items()}
    loras = {ours: _take_lora(ledger, name, source, ours, kind) for ours, name in plain.items()}
    routers = _take_gates(ledger, routed, source, kind)
    ledger.refuse()
    scale, scaled = common_scale({**low_rank, **loras})
    config = replace(
        PRESETS[PRESET_OF[kind.peft_type]],
        num_experts=kind.experts,
        experts_per_layer=(),
        top_k=kind.top_k,
        rank=scale.rank,
        alpha=scale.alpha,
        rs_lora=scale.rs_lora,
        dropout=settings.share("lora_dropout"),
        jitter=settings.number("jitter_noise", 0.0),
        balance_coefficient=settings.number("router_aux_loss_coef", _balance(kind)),
        molora=source.layers.patterns(routed),
        lora=source.layers.patterns(plain),
    )
    return Imported(config, scaled, routers)


def _read_kind(settings: Settings, source: Source) -> _Kind:
    check_settings(settings, *PRESET_OF, also=_OWN_KEYS)
    peft_type = settings.text("peft_type")
    settings.must_be("routing_strategy", *_STRATEGIES.get(peft_type, ()))
    settings.must_be_unset("use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform")
    activation = source.layers.activation
    settings.must_be("act_fn", activation, fix=f"{source.layers.name} computes with {activation}.")
    experts = settings.whole("num_experts", most=MAX_EXPERTS)
    top_k = 0 if peft_type == "LORAMOE" else settings.whole("top_k", 2, experts)
    plain, routed = _scale(settings), _scale(_expert_settings(settings))
    leaves = _leaves(settings)
    settings.refuse()
    return _Kind(peft_type, experts, top_k, plain, routed, leaves)


def _expert_settings(settings: Settings) -> Settings:
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


def _leaves(settings: Settings) -> frozenset[str]:
    """`target_modules` is a list, or an object of name -> whether."""
    if isinstance(settings.values.get("target_modules"), str):
        settings.complain("target_modules", "must be names", settings.values["target_modules"])
        return frozenset()
    return frozenset(_OLD_PROJECTIONS.get(name, name) for name in settings.names("target_modules"))


def _balance(kind: _Kind) -> float:
    """MoE-PEFT's own default, which its folders do not name."""
    return 0.0 if kind.peft_type == "LORAMOE" else 0.001


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first layout's names as today's."""
    return {_modern(name): tensor for name, tensor in tensors.items()}


def _modern(name: str) -> str:
    if gate := _OLD_GATE.fullmatch(name):
        return f"{gate[1]}.mlp.moe_gate.weight"
    if expert := _OLD_EXPERT.fullmatch(name):
        projection = _OLD_PROJECTIONS.get(expert[3], expert[3])
        return f"{expert[1]}.mlp.{projection}.experts.{expert[2]}.{expert[4]}"
    return name


def _check_modules(ledger: Ledger, source: Source) -> None:
    """Refuse the folder of another model in one line."""
    matches = (_MODULE.fullmatch(name) for name in ledger.tensors)
    names = dict.fromkeys(match["module"] for match in matches if match)
    modules = {name: name for name in names if not name.endswith(".mlp")}
    source.layers.resolve(modules, ledger.tensors, ledger.source)


def _find(source: Source, kind: _Kind, blocks: tuple[str, ...]) -> dict[str, str]:
    """Adapted linears of these blocks -> their foreign names."""
    found = source.layers.children(blocks, kind.leaves)
    return {ours: f"{kind.prefix}.layers.{tail_of(ours)}" for ours in found}


def _take_experts(ledger: Ledger, name: str, source: Source, ours: str, kind: _Kind) -> LowRank:
    in_features, out_features = source.layers.sizes[ours]
    rank, each = kind.routed.rank, range(kind.experts)
    A = [ledger.take(f"{name}.experts.{i}.lora_A.weight", rank, in_features) for i in each]
    B = [ledger.take(f"{name}.experts.{i}.lora_B.weight", out_features, rank) for i in each]
    return LowRank(stack(A), stack(B), kind.routed)


def _take_lora(ledger: Ledger, name: str, source: Source, ours: str, kind: _Kind) -> LowRank:
    (in_features, out_features), rank = source.layers.sizes[ours], kind.plain.rank
    A = ledger.take(f"{name}.lora_A.weight", rank, in_features)
    return LowRank(A, ledger.take(f"{name}.lora_B.weight", out_features, rank), kind.plain)


def _take_gates(
    ledger: Ledger, routed: Mapping[str, str], source: Source, kind: _Kind
) -> dict[str, Mapping[str, Tensor]]:
    """By module, or with MixLoRA by block."""
    gates: dict[str, Mapping[str, Tensor]] = {}
    for ours, name in routed.items():
        width = source.layers.sizes[ours][0]
        if kind.peft_type == "MIXLORA":
            ours, name, width = ours.rpartition(".")[0], name.rpartition(".")[0], source.layers.width
        if ours not in gates:
            gates[ours] = {"weight": ledger.take(f"{name}.moe_gate.weight", kind.experts, width)}
    return gates
