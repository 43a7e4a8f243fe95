"""A located base model -> a transformers causal LM with frozen use in mind: whole, or still unread.

Decision: both ways go through `from_pretrained`, so that names, tied weights, buffers, attention and missing
tensors are settled by the same code. The unread way hands it stand-ins in place of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.utils import logging as transformers_logging

from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.locate import BaseModel
from moe_medical.base_model.quantize import quantize_base
from moe_medical.base_model.stored import StoredTensor, stored_tensors
from moe_medical.config.schema import Quantization
from moe_medical.errors import DataError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ConvertedWeights(DataError):
    """Transformers converts the weights when it loads them: no part of a parameter is a part of a file."""


@dataclass(frozen=True)
class UnreadBase:
    """A model with its buffers in place and a stand-in, without memory, for each parameter."""

    model: nn.Module
    stored: dict[str, StoredTensor]
    """Parameter name -> its values on disk; a parameter that modules share is named once."""


def load_base(base: BaseModel, dtype: str, quantization: Quantization = "none") -> nn.Module:
    """The causal LM in the given dtype, without dropout of its own.

    Raises:
        ConfigError: it cannot be quantised that way.
        DataError: damaged or missing weights, or a model type that this transformers does not know.
    """
    verify_checksums(base.folder)
    with _explained(base):
        config = _config(base)
        safe = {"use_safetensors": True, "trust_remote_code": False}
        model = _from_pretrained(base, AutoModelForCausalLM, base.folder, config=config, dtype=dtype, **safe)
    quantize_base(model, quantization)
    return model


def load_unread_base(base: BaseModel, dtype: str) -> UnreadBase:
    """The same model before its parameters are read.

    Raises:
        DataError: as `load_base`.
        ConvertedWeights: no part of a parameter is a part of a file.
    """
    verify_checksums(base.folder)
    stored = stored_tensors(base.folder)
    with _explained(base):
        empty = _empty_model(base)
        _refuse_conversions(base, empty, stored)
        _drop_copies(empty, stored)
        model = _from_pretrained(
            base, type(empty), None, config=empty.config, dtype=dtype, state_dict=dict(stored)
        )
        model.generation_config = _generation_config(base)
    return UnreadBase(model, _find_parameters(base, model, stored))


def empty_base(base: BaseModel) -> nn.Module:
    """The causal LM on the meta device: modules, names and shapes, from the config alone.

    Raises:
        DataError: a model type that this transformers does not know.
    """
    with _explained(base):
        model: nn.Module = _empty_model(base)
    return model


def _from_pretrained(base: BaseModel, kind: Any, source: Any, dtype: str, **options: Any) -> nn.Module:
    transformers_logging.disable_progress_bar()
    model, info = kind.from_pretrained(
        source, dtype=_DTYPES[dtype], local_files_only=True, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise DataError(f"{base.folder} lacks weights of a {base.model_type} model: {missing}")
    model.requires_grad_(False)
    return model


@contextmanager
def _explained(base: BaseModel) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise DataError(f"{base.folder} cannot be loaded as a causal LM: {str(e).splitlines()[0]}") from None


def _config(base: BaseModel) -> PretrainedConfig:
    """A frozen base does not overfit: only the adapters' own dropout acts."""
    config = AutoConfig.from_pretrained(base.folder, trust_remote_code=False)
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def _generation_config(base: BaseModel) -> GenerationConfig:
    """As `from_pretrained` finds it beside the weights."""
    own = (base.folder / "generation_config.json").is_file()
    where = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    return GenerationConfig.from_pretrained(base.folder, local_files_only=True, **where)


def _empty_model(base: BaseModel) -> Any:
    """The class, the config and the parameter names that AutoModelForCausalLM would settle on."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(base), trust_remote_code=False)


def _refuse_conversions(base: BaseModel, empty: Any, names: Collection[str]) -> None:
    """Before transformers tries one on stand-ins, which would make it allocate the result."""
    quantized = getattr(empty.config, "quantization_config", None) is not None
    steps = get_model_conversion_mapping(empty)
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    renamings = [step for step in steps if not isinstance(step, WeightConverter)]
    converted = [n for n in names if rename_source_key(n, renamings, converters)[1] is not None]
    if quantized or converted:
        raise _not_in_parts(base, converted or ["quantized tensors"])


def _drop_copies(empty: Any, stored: dict[str, StoredTensor]) -> None:
    """Equal copies of tied tensors count as one, as in `from_pretrained`; unequal ones stay apart."""
    for target, source in empty.all_tied_weights_keys.items():
        if target in stored and source in stored and stored[target].equals(stored[source]):
            del stored[target]


def _find_parameters(
    base: BaseModel, model: nn.Module, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    by_pointer = {tensor.pointer: tensor for tensor in stored.values() if tensor.pointer is not None}
    for buffer in model.buffers():
        if tensor := by_pointer.get(buffer.data_ptr()):
            buffer.data = tensor.read().view(tensor.shape).to(buffer.dtype)
    found = {name: by_pointer.get(p.data_ptr()) for name, p in model.named_parameters()}
    if lost := [name for name, tensor in found.items() if tensor is None]:
        raise _not_in_parts(base, lost)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _not_in_parts(base: BaseModel, names: Collection[str]) -> ConvertedWeights:
    return ConvertedWeights(
        f"{base.folder} cannot be read in parts, as ZeRO-3 needs: transformers converts "
        f"{', '.join(sorted(names)[:3])} of a {base.model_type} model when it loads them. Use ZeRO-2."
    )
