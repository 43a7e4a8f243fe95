"""Published systems as adapter settings: a preset fills every field that the run file leaves open.

Sources: ming_moe is MING-MOE (arXiv 2404.09027) with the released code's values; lora is LoRA
(arXiv 2106.09685) on the same layers, the control arm.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from moe_medical.config.schema import AdaptersSection

TASK_FEATURES = 64
"""Numbers that a task router knows a task by (MOELoRA, arXiv 2310.18339)."""
FFN = r".*\.(mlp|feed_forward|ffn)\.\w+"
ATTENTION = r".*\.(self_attn|attn|attention|self_attention)\.\w+"


@dataclass(frozen=True)
class MoloraConfig:
    """Adapter settings with every field decided. Saved with each adapter and checkpoint."""

    preset: str = "ming_moe"
    router: str = "token"
    """`token` or `task`."""
    num_tasks: int = 0
    """Tasks that a task router tells apart; 0 under token routing."""
    num_experts: int = 8
    top_k: int = 2
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    molora: tuple[str, ...] = (FFN,)
    lora: tuple[str, ...] = (ATTENTION,)
    balance_coefficient: float = 0.0
    z_coefficient: float = 0.0

    def router_sizes(self, in_features: int) -> tuple[int, int]:
        """Numbers in each parameter of a layer's router: weight and bias, or task embedding and weight."""
        if self.router == "task":
            return self.num_tasks * TASK_FEATURES, self.num_experts * TASK_FEATURES
        return self.num_experts * in_features, self.num_experts

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


PRESETS: dict[str, MoloraConfig] = {
    "ming_moe": MoloraConfig(),
    "lora": MoloraConfig(preset="lora", num_experts=1, top_k=1, molora=(), lora=(FFN, ATTENTION)),
}


def resolve_adapters(section: AdaptersSection, num_tasks: int = 0) -> MoloraConfig:
    """The preset with the section's own values on top.

    Args:
        section: Of the run file.
        num_tasks: Of the mixture, which a task router needs.
    """
    given: dict[str, Any] = {}
    for key, value in ((f.name, getattr(section, f.name)) for f in fields(section)):
        if value is not None:
            given[key] = tuple(value) if isinstance(value, list) else value
    resolved = replace(PRESETS[section.preset], **given)
    return replace(resolved, num_tasks=num_tasks) if resolved.router == "task" else resolved
