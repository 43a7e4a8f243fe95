"""What adapters have put into a model, counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moe_medical.adapters.layer import AdaptedLinear, LoraLinear
from moe_medical.adapters.model import adapter_modules, adapter_parameters


@dataclass(frozen=True)
class AdapterSummary:
    """What `attach_adapters` has put into a model."""

    num_molora: int
    num_lora: int
    num_parameters: int
    """Trainable numbers, those of the routers included."""
    num_router_parameters: int


def summarize_adapters(model: nn.Module) -> AdapterSummary:
    """Count the adapted layers and their parameters; not for ZeRO-3's partitioned parameters."""
    modules = list(adapter_modules(model))
    linears = [module for module in modules if isinstance(module, AdaptedLinear)]
    num_lora = sum(isinstance(module, LoraLinear) for module in linears)
    parameters = adapter_parameters(model)
    return AdapterSummary(
        num_molora=len(linears) - num_lora,
        num_lora=num_lora,
        num_parameters=sum(p.numel() for p in parameters.values()),
        num_router_parameters=sum(
            parameters[f"{module.name}.{name}"].numel()
            for module in modules
            for name in module.adapter_parameters()
            if name.startswith("router.")
        ),
    )
