"""The run file: typed sections, presets of published systems, loading and validation."""

from moe_medical.config.load import load_config, save_config
from moe_medical.config.presets import MoloraConfig, resolve_adapters
from moe_medical.config.schema import RunConfig

__all__ = ["MoloraConfig", "RunConfig", "load_config", "resolve_adapters", "save_config"]
