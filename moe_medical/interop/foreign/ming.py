"""MING-MOE (MediaBrain-SJTU/MING, branches ming-moe and ming-moe-dev): three artefacts in one folder.

    config.json              the base's own, with num_experts, num_experts_per_token, share_expert, ...
    adapter_config.json      PEFT's: r, lora_alpha, use_rslora, which the experts use too
    adapter_model.*          PEFT LoRA of the attention; absent where the attention was not trained
    non_lora_trainables.bin  of each linear of each MLP, under [base_model.model.]MODULE:
        switch.weight (E, D), switch.bias (E,)
        experts.I.lora_A_I.weight (r, D), experts.I.lora_B_I.weight (F, r)
        share_experts.lora_A.weight (n r, D), share_experts.lora_B.weight (F, n r)    with share_expert

Step checkpoints of the published trainer lack the switches (its key filter misses them), and are refused.
Sampled experts are refused: there a sample is weighed by its raw logits, also in evaluation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import Tensor

from moe_medical.config.presets import PRESETS
from moe_medical.interop.foreign.ledger import Ledger
from moe_medical.interop.foreign.parts import WEIGHT_FILES, Imported, Source, stack
from moe_medical.interop.foreign.peft import (
    PREFIX,
    check_settings,
    foreign_modules,
    take_loras,
)
from moe_medical.interop.foreign.scale import LowRank, Scale, common_scale, in_scale
from moe_medical.interop.foreign.settings import Settings

EXPERT_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
MODEL_FILE = "config.json"
MAX_EXPERTS = 1024
_MODULE = re.compile(r"(?P<module>.+?)\.(switch|experts|share_experts)\..+")


@dataclass(frozen=True)
class _Experts:
    """What config.json says of them."""

    count: int
    top_k: int
    shared: int
    balance: float

    @classmethod
    def of(cls, settings: Settings) -> _Experts:
        settings.must_be(
            "expert_selection", "top_k", fix="A sample's raw logits as weights are not supported."
        )
        shared = settings.whole("num_share_experts", 1, MAX_EXPERTS) if settings.flag("share_expert") else 0
        balance = settings.number("lbl_loss_coeff", 0.0) if settings.flag("use_lbl_loss") else 0.0
        count = settings.whole("num_experts", most=MAX_EXPERTS)
        return cls(count, settings.whole("num_experts_per_token", 2, count), shared, balance)


def read_ming(source: Source) -> Imported:
    """A MING folder -> preset `ming_moe`."""
    settings, model = source.settings(), source.settings(MODEL_FILE)
    check_settings(settings, "LORA")
    settings.must_be_unset("use_dora")
    experts = _Experts.of(model)
    settings.refuse()
    model.refuse()
    scale = Scale(settings.whole("r"), settings.number("lora_alpha"), settings.flag("use_rslora"))
    attention = _attention(source, settings)
    ledger = source.ledger(source.tensors(*EXPERT_FILES))
    names = _modules(ledger, source)
    routed = {ours: _take_experts(ledger, name, source, ours, experts, scale) for ours, name in names.items()}
    routers = {ours: _take_switch(ledger, name, source, ours, experts) for ours, name in names.items()}
    shared = _take_shared(ledger, names, source, experts, scale)
    ledger.refuse()
    common, low_rank = common_scale({**routed, **attention})
    config = replace(
        PRESETS["ming_moe"],
        num_experts=experts.count,
        top_k=experts.top_k,
        shared_experts=experts.shared,
        balance_coefficient=experts.balance,
        rank=common.rank,
        alpha=common.alpha,
        rs_lora=common.rs_lora,
        dropout=settings.share("lora_dropout"),
        molora=source.layers.patterns(routed),
        lora=source.layers.patterns(attention),
    )
    scaled = {name: in_scale(LowRank(*pair, scale), common) for name, pair in shared.items()}
    return Imported(config, low_rank, routers, {name: (p.A, p.B) for name, p in scaled.items()})


def _attention(source: Source, settings: Settings) -> dict[str, LowRank]:
    if source.file(*WEIGHT_FILES) is None:
        return {}
    ledger = source.ledger(source.tensors(*WEIGHT_FILES))
    names = foreign_modules(ledger, source.layers)
    low_rank = take_loras(ledger, settings, source.layers, names)
    ledger.refuse()
    return low_rank


def _modules(ledger: Ledger, source: Source) -> dict[str, str]:
    """Linears of the base's MLPs, all of which have experts -> their foreign names."""
    matches = (_MODULE.fullmatch(name) for name in ledger.tensors)
    names = dict.fromkeys(match["module"] for match in matches if match)
    resolved = source.layers.resolve({n: _bare(n) for n in names}, ledger.tensors, ledger.source)
    foreign = {ours: name for name, ours in resolved.items()}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
    return {ours: foreign.get(ours, prefix + ours) for ours in source.layers.children(("mlp",))}


def _bare(name: str) -> str:
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith(PREFIX) else name


def _take_experts(
    ledger: Ledger, name: str, source: Source, ours: str, experts: _Experts, scale: Scale
) -> LowRank:
    in_features, out_features = source.layers.sizes[ours]
    each = range(experts.count)
    A = [ledger.take(f"{name}.experts.{i}.lora_A_{i}.weight", scale.rank, in_features) for i in each]
    B = [ledger.take(f"{name}.experts.{i}.lora_B_{i}.weight", out_features, scale.rank) for i in each]
    return LowRank(stack(A), stack(B), scale)


def _take_switch(
    ledger: Ledger, name: str, source: Source, ours: str, experts: _Experts
) -> dict[str, Tensor]:
    weight = ledger.take(f"{name}.switch.weight", experts.count, source.layers.sizes[ours][0])
    return {"weight": weight, "bias": ledger.take(f"{name}.switch.bias", experts.count)}


def _take_shared(
    ledger: Ledger, names: dict[str, str], source: Source, experts: _Experts, scale: Scale
) -> dict[str, tuple[Tensor, Tensor]]:
    """One adapter of rank n r is n of rank r, each with weight 1."""
    if not experts.shared:
        return {}
    found, rank = {}, experts.shared * scale.rank
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        A = ledger.take(f"{name}.share_experts.lora_A.weight", rank, in_features)
        B = ledger.take(f"{name}.share_experts.lora_B.weight", out_features, rank)
        B_FSR = B.unflatten(1, (experts.shared, scale.rank))
        found[ours] = A.unflatten(0, (experts.shared, scale.rank)), B_FSR.transpose(0, 1)
    return found
