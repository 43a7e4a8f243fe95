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
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from moe_medical.config.adapters import PRESETS
from moe_medical.interop.foreign.peft import PREFIX, check_settings, foreign_modules, take_loras
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

EXPERT_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
MODEL_FILE = "config.json"
_MODULE = re.compile(r"(?P<module>.+?)\.(switch|experts|share_experts)\..+")


@dataclass(frozen=True)
class _Experts:
    """What config.json says of them."""

    count: int
    top_k: int
    shared: int
    balance: float

    @classmethod
    def of(cls, model: Settings) -> _Experts:
        fix = "A sample's raw logits as weights are not supported."
        model.must_be("expert_selection", "top_k", fix=fix)
        count = model.whole("num_experts", most=MAX_EXPERTS)
        return cls(
            count=count,
            top_k=model.whole("num_experts_per_token", 2, count),
            shared=model.whole("num_share_experts", 1, MAX_EXPERTS) if model.flag("share_expert") else 0,
            balance=model.number("lbl_loss_coeff", 0.0) if model.flag("use_lbl_loss") else 0.0,
        )


def read_ming(source: Source) -> Imported:
    """A MING folder -> preset `ming_moe`."""
    settings = source.settings()
    check_settings(settings, "LORA")
    settings.must_be_unset("use_dora")
    model = source.settings(MODEL_FILE)
    experts = _Experts.of(model)
    # Before any tensor is read: their shapes follow from the settings.
    settings.refuse()
    model.refuse()
    attention = _take_attention(source, settings)
    reader = source.reader(*EXPERT_FILES)
    names = _expert_modules(reader, source)
    scale = Scale(settings.whole("r"), settings.number("lora_alpha"), settings.flag("use_rslora"))
    routed = _take_experts(reader, source, names, experts, scale)
    routers = _take_switches(reader, source, names, experts)
    shared = _take_shared(reader, source, names, experts, scale)
    reader.refuse()
    common, low_rank = in_common_scale({**routed, **attention})
    config = replace(
        PRESETS["ming_moe"],
        num_experts=experts.count,
        top_k=experts.top_k,
        shared_experts=experts.shared,
        balance_coefficient=experts.balance,
        rank=common.rank,
        alpha=common.alpha,
        rs_lora=common.rs_lora,
        dropout=settings.fraction("lora_dropout"),
        molora=source.layers.patterns(routed),
        lora=source.layers.patterns(attention),
    )
    # `rank_pattern` may give the attention a greater rank, which then is that of all experts.
    shared = {name: factors.rescaled(common) for name, factors in shared.items()}
    return Imported(config, low_rank, routers, shared)


def _take_attention(source: Source, settings: Settings) -> dict[str, Factors]:
    """Plain LoRAs, in a file of their own; none where the attention was not trained."""
    if source.file(*WEIGHT_FILES) is None:
        return {}
    reader = source.reader(*WEIGHT_FILES)
    low_rank = take_loras(reader, settings, source.layers, foreign_modules(reader, source.layers))
    reader.refuse()
    return low_rank


def _expert_modules(reader: TensorReader, source: Source) -> dict[str, str]:
    """Linears of the base's MLPs, all of which have experts -> their foreign names."""
    bare = {name: name.removeprefix(PREFIX) for name in reader.modules(_MODULE)}
    resolved = source.layers.resolve(bare, reader.tensors, reader.source)
    foreign = {ours: name for name, ours in resolved.items()}
    # A linear that the file lacks is asked for under the name that it would have there, and then named so.
    prefix = PREFIX if any(name.startswith(PREFIX) for name in bare) else ""
    return {ours: foreign.get(ours, prefix + ours) for ours in source.layers.children(("mlp",))}


def _take_experts(
    reader: TensorReader, source: Source, names: Mapping[str, str], experts: _Experts, scale: Scale
) -> dict[str, Factors]:
    found = {}
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        # An expert's number stands in its tensors' names twice.
        names_A = [f"{name}.experts.{i}.lora_A_{i}.weight" for i in range(experts.count)]
        names_B = [f"{name}.experts.{i}.lora_B_{i}.weight" for i in range(experts.count)]
        A = reader.take_stacked(names_A, scale.rank, in_features)
        B = reader.take_stacked(names_B, out_features, scale.rank)
        found[ours] = Factors(A, B, scale)
    return found


def _take_switches(
    reader: TensorReader, source: Source, names: Mapping[str, str], experts: _Experts
) -> dict[str, dict[str, Tensor]]:
    """Each linear has a router of its own, a linear layer with a bias."""
    found = {}
    for ours, name in names.items():
        in_features, _ = source.layers.sizes[ours]
        weight = reader.take(f"{name}.switch.weight", experts.count, in_features)
        found[ours] = {"weight": weight, "bias": reader.take(f"{name}.switch.bias", experts.count)}
    return found


def _take_shared(
    reader: TensorReader, source: Source, names: Mapping[str, str], experts: _Experts, scale: Scale
) -> dict[str, Factors]:
    """MING's one shared adapter of rank S r is S shared experts of rank r, each with weight 1.

    B A is a sum over the rank, so that it can be cut anywhere: A by rows, B by columns.
    """
    if not experts.shared:
        return {}
    each = (experts.shared, scale.rank)
    found = {}
    for ours, name in names.items():
        in_features, out_features = source.layers.sizes[ours]
        A = reader.take(f"{name}.share_experts.lora_A.weight", experts.shared * scale.rank, in_features)
        B = reader.take(f"{name}.share_experts.lora_B.weight", out_features, experts.shared * scale.rank)
        B_FSR = B.unflatten(1, each)
        found[ours] = Factors(A.unflatten(0, each), B_FSR.transpose(0, 1), scale)
    return found
