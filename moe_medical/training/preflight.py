"""Everything that can be wrong is found once, before any rank is started. Torch-free.

Derived files (the embedded model and tasks) are made here too, by one process instead of every rank.
"""

from __future__ import annotations

from moe_medical.adapters.placement import match_modules
from moe_medical.base_model import locate_base
from moe_medical.base_model.shapes import linear_shapes
from moe_medical.config import RunConfig, resolve_adapters
from moe_medical.data.formats import ChatFormat
from moe_medical.data.tasks import build_plan, load_tasks


def preflight(config: RunConfig) -> None:
    """Read what the run will read.

    Raises:
        MoeMedicalError: whatever a rank would have met.
    """
    base = locate_base(config.model)
    match_modules(linear_shapes(base), resolve_adapters(config.adapters))
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    samples = config.training.steps * config.training.global_batch
    build_plan(tasks, config.data, config.run.seed, samples).counts(samples)
