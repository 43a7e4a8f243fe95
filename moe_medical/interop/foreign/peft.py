"""PEFT LoRA: `adapter_config.json` beside `adapter_model.safetensors` or `.bin`.

    base_model.model.MODULE.lora_A.weight                  (r, D)
    base_model.model.MODULE.lora_B.weight                  (F, r)
    base_model.model.MODULE.lora_magnitude_vector[.weight] (F,)    with `use_dora`; no `.weight` before 0.11

Scaling is alpha / r, or alpha / sqrt(r) with `use_rslora`; `rank_pattern` and `alpha_pattern` give modules
their own. `fan_in_fan_out` says how the base stores its weight, and changes nothing in A and B.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from moe_medical.config.adapters import PRESETS
from moe_medical.errors import Problem
from moe_medical.interop.foreign.base_layers import BaseLayers
from moe_medical.interop.foreign.source import (
    END_OF_NAME,
    WEIGHT_FILES,
    Factors,
    Imported,
    Scale,
    Settings,
    Source,
    TensorReader,
    in_common_scale,
)

PREFIX = "base_model.model."
_TENSOR = re.compile(
    r"(?P<module>.+)\.(lora_[AB](\.default)?\.weight|lora_magnitude_vector(\.default)?(\.weight)?)"
)
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying", "merge_weights",
    "layers_pattern", "layers_to_transform", "target_modules", "exclude_modules", "r", "lora_alpha",
    "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
}  # fmt: skip
"""Keys that are read here, or that say nothing about the numbers once the adapter is trained."""
_SAME_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""First values that leave the base's weights as they were; PiSSA, OLoRA, LoftQ and CorDA do not."""


def read_peft_lora(source: Source) -> Imported:
    """A PEFT LoRA folder -> preset `lora`."""
    settings = source.settings()
    check_settings(settings, "LORA")
    dora = settings.flag("use_dora")
    settings.refuse()
    reader = source.reader(*WEIGHT_FILES)
    names = foreign_modules(reader, source.layers)
    factors = take_loras(reader, settings, source.layers, names)
    magnitudes = {}
    if dora:
        for name, ours in names.items():
            own = f"{name}.lora_magnitude_vector"
            spelt = own if own in reader.tensors else _spelt(reader, own)  # PEFT before 0.11: no `.weight`
            magnitudes[ours] = reader.take(spelt, source.layers.sizes[ours][1])
    reader.refuse()
    scale, factors = in_common_scale(factors)
    config = replace(
        PRESETS["lora"],
        rank=scale.rank,
        alpha=scale.alpha,
        rs_lora=scale.rs_lora,
        dora=dora,
        dropout=settings.fraction("lora_dropout"),
        lora=source.layers.patterns(factors),
    )
    return Imported(config, factors, magnitudes=magnitudes)


def check_settings(settings: Settings, *kinds: str, also: Collection[str] = ()) -> None:
    """Refuse, by name, all that would give other numbers than A and B do.

    Args:
        settings: Of the folder.
        kinds: Allowed values of `peft_type`.
        also: Further keys that the caller reads.
    """
    settings.must_be("peft_type", *kinds)
    settings.must_be("bias", "none", fix="Trained biases of the base have no place in an adapter here.")
    if saved := settings.values.get("modules_to_save"):
        fix = "Whole trained modules have no place in an adapter here."
        settings.complain("modules_to_save", "must be empty", saved, fix)
    fix = "It changed the base's weights: convert the adapter with PEFT before."
    settings.must_be("init_lora_weights", *_SAME_BASE, fix=fix)
    # A key of a later PEFT may well change the forward pass: whatever is not known must be unset.
    settings.must_be_unset(*sorted(settings.values.keys() - _HARMLESS - {"modules_to_save"} - set(also)))
    _check_patterns(settings)
    settings.whole("r")
    settings.number("lora_alpha", zero=False)
    settings.fraction("lora_dropout")
    settings.flag("use_rslora")


def _check_patterns(settings: Settings) -> None:
    # Tried here, so that no pattern can fail in the middle of the tensors.
    settings.check_pattern("target_modules")
    settings.check_pattern("exclude_modules")
    ranks = settings.by_pattern("rank_pattern")
    for pattern in ranks.values:
        ranks.whole(pattern)
    alphas = settings.by_pattern("alpha_pattern")
    for pattern in alphas.values:
        alphas.number(pattern, zero=False)
    layers = settings.values.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(number) is int for number in numbers):
        settings.complain("layers_to_transform", "must be layer numbers", layers)


def foreign_modules(reader: TensorReader, layers: BaseLayers) -> dict[str, str]:
    """Foreign module name, as it stands before `.lora_A`, -> ours."""
    bare = {name: name.removeprefix(PREFIX) for name in reader.modules(_TENSOR)}
    return layers.resolve(bare, reader.tensors, reader.source)


def take_loras(
    reader: TensorReader, settings: Settings, layers: BaseLayers, names: Mapping[str, str]
) -> dict[str, Factors]:
    """A and B of each module that the settings or the tensors name.

    Args:
        reader: Of the folder.
        settings: Checked ones.
        layers: Of the base.
        names: From `foreign_modules`.
    """
    wanted = _targeted(settings, layers.sizes)
    for name, ours in names.items():
        if wanted is not None and ours not in wanted:
            reader.complain(Problem(name, "is not among target_modules"))
    foreign = {ours: name for name, ours in names.items()}
    prefix = PREFIX if any(name.startswith(PREFIX) for name in reader.tensors) else ""
    found = {}
    for ours, (in_features, out_features) in layers.sizes.items():
        if ours in foreign or ours in (wanted or ()):
            name = foreign.get(ours, prefix + ours)  # one that is not there will be told under this name
            scale = _scale_of(settings, name.removeprefix(PREFIX))
            A = reader.take(_spelt(reader, f"{name}.lora_A"), scale.rank, in_features)
            B = reader.take(_spelt(reader, f"{name}.lora_B"), out_features, scale.rank)
            found[ours] = Factors(A, B, scale)
    return found


def _targeted(settings: Settings, names: Collection[str]) -> list[str] | None:
    """Which linear layers `target_modules` means; None where it does not tell.

    Names are ends of ours, whatever stands before them; a pattern may be of the names before a renaming.
    """
    layers = settings.values.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers
    chosen = []
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        in_layers = not numbers or (number is not None and int(number[1]) in numbers)
        excluded = _is_named(settings, "exclude_modules", name)
        if _is_named(settings, "target_modules", name) and not excluded and in_layers:
            chosen.append(name)
    listed = isinstance(settings.values.get("target_modules"), list | dict)
    return chosen if chosen or listed else None


def _is_named(settings: Settings, key: str, name: str) -> bool:
    # As PEFT: a text is a pattern of whole names, a list holds names or their ends.
    value = settings.values.get(key)
    if isinstance(value, str):
        return value == "all-linear" or re.fullmatch(value, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in settings.names(key))


def _scale_of(settings: Settings, module: str) -> Scale:
    """Rank and alpha of one module, by its foreign name."""
    rank = _by_pattern(settings.values.get("rank_pattern"), module, settings.whole("r"))
    alpha = _by_pattern(settings.values.get("alpha_pattern"), module, settings.number("lora_alpha"))
    return Scale(int(rank), float(alpha), settings.flag("use_rslora"))


def _by_pattern(patterns: Any, module: str, default: float) -> float:
    """The first whose pattern matches the end of the name, as in PEFT's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(END_OF_NAME.format(pattern), module):
            return float(value)
    return default


def _spelt(reader: TensorReader, name: str) -> str:
    """With the adapter's name, as in a state that was gathered by hand, or as PEFT writes it."""
    named = f"{name}.default.weight"
    return named if named in reader.tensors else f"{name}.weight"
