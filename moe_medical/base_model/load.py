"""A located base model -> a transformers causal LM with frozen use in mind."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moe_medical.base_model.embedded import verify_checksums
from moe_medical.base_model.locate import BaseModel
from moe_medical.errors import DataError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_base(base: BaseModel, dtype: str) -> nn.Module:
    """The causal LM in the given dtype, without cache and without dropout of its own.

    Raises:
        DataError: damaged or missing weights, or a model type that this transformers does not know.
    """
    verify_checksums(base.folder)
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
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
