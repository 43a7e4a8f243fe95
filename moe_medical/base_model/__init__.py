"""The frozen base LLM: where it comes from, what shapes it has, how it is loaded.

Safetensors only, and no code from a model folder is ever run. `locate` and `shapes` need no torch,
so that a plan can be made in about a second; `load` and `stored` import it.
"""

from moe_medical.base_model.locate import BaseModel, locate_base

__all__ = ["BaseModel", "locate_base"]
