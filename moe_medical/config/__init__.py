"""The run file: typed sections, presets of published systems, loading and validation."""

from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.load import load_config, save_config
from moe_medical.config.schema import RunConfig

__all__ = ["MoloraConfig", "RunConfig", "load_config", "save_config"]
