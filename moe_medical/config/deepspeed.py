"""The DeepSpeed JSON: reading it, which keys the run file owns, which are known.

Decisions: DeepSpeed ignores a top-level key that it does not know, so that a misspelt `zero_optimization`
would train without ZeRO; hence both sets are closed. They are those of DeepSpeed 0.19.8, written down since
importing it takes seconds; a test compares them. Left out are the keys that would change the loss or the
data, split the model, or log elsewhere (`gradient_allreduce_op`, `data_efficiency`, `tensor_parallel`,
`wandb`, ...), and those of NVMe offload (`aio`). What lies inside other keys is DeepSpeed's to check.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RUN_FILE_OWNS = {
    "train_batch_size": "training.global_batch",
    "train_micro_batch_size_per_gpu": "training.micro_batch",
    "gradient_accumulation_steps": "training.global_batch",
    "gradient_clipping": "training.clip_norm",
    "optimizer": "training.learning_rate",
    "scheduler": "training.schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "model.dtype",
    "communication_data_type": "model.dtype",
    "activation_checkpointing": "training.activation_checkpointing",
    "compile": "training.compile",
    "checkpoint": "checkpoint section",
    "steps_per_print": "tracking.log_every_steps",
}
"""DeepSpeed keys that the run file decides, and where."""

TOP_LEVEL_KEYS = frozenset(
    {
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "wall_clock_breakdown",
        "memory_breakdown",
        "flops_profiler",
        "comms_logger",
        "timers",
        "dump_state",
        "disable_python_gc",
        "log_level",
    }
)
"""Keys of the JSON that make sense beside a run file."""

ZERO_FLAGS = frozenset(
    {
        "contiguous_gradients",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "use_all_reduce_for_fetch_params",
        "stage3_use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    }
)
"""True or false in `deepspeed.runtime.zero.config.DeepSpeedZeroConfig`, by name and alias."""

ZERO_COUNTS = frozenset(
    {
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "prefetch_bucket_size",
        "stage3_prefetch_bucket_size",
        "param_persistence_threshold",
        "stage3_param_persistence_threshold",
        "model_persistence_threshold",
        "stage3_model_persistence_threshold",
        "max_live_parameters",
        "stage3_max_live_parameters",
        "max_reuse_distance",
        "stage3_max_reuse_distance",
        "module_granularity_threshold",
        "stage3_module_granularity_threshold",
        "zero_hpz_partition_size",
    }
)
"""Its whole numbers."""

ZERO_KEYS = (
    ZERO_FLAGS | ZERO_COUNTS | {"stage", "offload_param", "offload_optimizer", "zenflow", "leaf_module"}
)

OFFLOAD_KEYS = {
    "offload_optimizer": frozenset(
        {
            "device",
            "nvme_path",
            "buffer_count",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "ratio",
            "super_offload",
            "cpuadam_cores_perc",
        }
    ),
    "offload_param": frozenset(
        {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}
    ),
}
"""Fields of its two offload sections."""


def read_deepspeed(path: Path | str) -> dict[str, Any]:
    """A DeepSpeed JSON that `validate` has accepted."""
    return dict(json.loads(Path(path).read_text()))


def zero_stage(settings: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed JSON, 0 where it names none."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def stage_of_file(path: Path | str) -> int:
    """The same of a file; 0 where it cannot be read, which the rules tell by themselves."""
    try:
        return zero_stage(read_deepspeed(path))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0


def offloads(settings: Mapping[str, Any], section: str) -> bool:
    """Whether a DeepSpeed JSON moves what `section` (offload_optimizer, offload_param) names off the GPU."""
    part = settings.get("zero_optimization", {}).get(section) or {}
    return bool(part.get("device", "none") != "none")
