"""A located base model -> a transformers causal LM with frozen use in mind."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.locate import BaseModel
from moe_medical.errors import DataError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(base: BaseModel, dtype: str) -> nn.Module:
    """The causal LM in the given dtype, without dropout of its own.

    Raises:
        DataError: damaged or missing weights, or a model type that this transformers does not know.
    """
    verify_checksums(base.folder)
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
            config=_without_dropout(AutoConfig.from_pretrained(base.folder, trust_remote_code=False)),
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise DataError(f"{base.folder} cannot be loaded as a causal LM: {str(e).splitlines()[0]}") from None
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise DataError(f"{base.folder} lacks weights of a {base.model_type} model: {missing}")
    model.requires_grad_(False)
    return model


def _without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """A frozen base does not overfit: only the adapters' own dropout acts."""
    for key, value in config.to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    return config
