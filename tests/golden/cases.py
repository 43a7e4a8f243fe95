"""The golden cases: one table, name -> what differs from the run file of `support.tiny.write_tiny_run`.

Values that begin with @ stand for a file or folder that exists only while the cases run:

    @zero0, @zero2, @zero3, @zero2_offload    a DeepSpeed JSON of `support.training.write_zero_settings`
    @NAME/adapter                              the adapter folder that the case NAME has written
    @wrong                                     the recipe of tasks that are taught the opposite of the truth

A case may be added at any time. One that is changed or taken away changes the record: see `run.py`.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

COMMON: Settings = {
    "training.steps": 4,
    "training.epsilon": 1e-4,  # the usual 1e-8 would turn another processor's rounding into other steps
    "adapters.dropout": 0.0,
    "data.cache": "never",
    "evaluation.score_rows": 0,
    "evaluation.every_steps": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep": 20,
    "tracking.conflict_every_steps": 0,
    "tracking.routing_every_steps": 0,
    "tracking.log_every_steps": 1,
}
"""Of every case, unless it says otherwise."""
LOSSES: Settings = {"adapters.balance_coefficient": 0.5, "adapters.z_coefficient": 0.1}
TWO_PASSES: Settings = {"training.micro_batch": 2}
DENSE: Settings = {"adapters.top_k": None}
MOVING: Settings = {
    "data.mix.block": 8,
    "data.mix.rule": "uniform",
    "data.mix.dynamic.smoothing": 0.5,
    "data.mix.dynamic.rate": 2.0,
    "training.steps": 14,
    "training.loss.window": 2,
}
"""A decision comes into force eight steps after it is made, so these need more steps than the others."""

CASES: dict[str, Settings] = {
    # How samples become batches
    "packed": LOSSES
    | {
        "training.steps": 6,
        "evaluation.every_steps": 3,
        "evaluation.score_rows": 2,
        "evaluation.scores": "always",
        "tracking.conflict_every_steps": 3,
        "tracking.routing_every_steps": 2,
        "checkpoint.every_steps": 2,
    },
    "grouped": LOSSES | TWO_PASSES | {"data.batching": "grouped", "data.workers": 0},
    "padded": LOSSES
    | TWO_PASSES
    | {"data.batching": "padded", "training.balance_over": "micro_batch", "data.cache": "always"},
    "alone": LOSSES | TWO_PASSES | {"parallel.ranks": 1, "data.batching": "grouped"},
    # How the state is spread over ranks
    "zero0": LOSSES | {"parallel.deepspeed": "@zero0"},
    "zero2_offload": LOSSES | TWO_PASSES | {"parallel.deepspeed": "@zero2_offload"},
    "zero3": LOSSES | TWO_PASSES | {"parallel.deepspeed": "@zero3", "data.batching": "grouped"},
    "ep_tokens": LOSSES | {"parallel.ep_size": 2, "parallel.exchange": "tokens"},
    "ep_weights": LOSSES
    | {"parallel.ep_size": 2, "parallel.exchange": "weights", "parallel.deepspeed": "@zero0"},
    "ep_tokens_zero3": LOSSES
    | TWO_PASSES
    | {
        "parallel.ep_size": 2,
        "parallel.exchange": "tokens",
        "parallel.deepspeed": "@zero3",
        "data.batching": "padded",
    },
    "ep_weights_kept": LOSSES
    | TWO_PASSES
    | {
        "parallel.ep_size": 2,
        "parallel.exchange": "weights",
        "parallel.keep_gathered": True,
        "training.activation_checkpointing": "non_reentrant",
    },
    # Routers and experts
    "task": {"adapters.preset": "moelora", "adapters.rank": 8, "adapters.top_k": 0},
    "joint": LOSSES | {"adapters.router": "joint", "adapters.router_scope": "layer", **DENSE},
    "sequence": {
        "adapters.router": "sequence",
        "adapters.router_scope": "block",
        "adapters.entropy_coefficient": 0.1,
    },
    "threshold": LOSSES | {"adapters.preset": "adamole", **DENSE},
    "hierarchical": LOSSES
    | {
        "adapters.router": "hierarchical",
        "adapters.groups": 2,
        "adapters.renormalise": False,
        "adapters.temperature": 2,
    },
    "model_scope": LOSSES | {"adapters.router_scope": "model", "adapters.rs_lora": True},
    "lora": {"adapters.preset": "lora", "adapters.num_experts": None, **DENSE},
    "lora_reentrant": {
        "adapters.preset": "lora",
        "adapters.num_experts": None,
        "adapters.dropout": 0.1,
        "training.activation_checkpointing": "reentrant",
        "run.seed": 3,
        **DENSE,
    },
    "xlora": {
        "adapters.preset": "xlora",
        "adapters.num_experts": 2,
        "adapters.experts_from": ["@lora/adapter", "@lora_reentrant/adapter"],
        **DENSE,
    },
    "mixlora": LOSSES | {"adapters.preset": "mixlora"},
    "med_moe": {
        "adapters.preset": "med_moe",
        "adapters.freeze_router": False,
        "adapters.molora": [".*mlp.*_proj"],
        **DENSE,
    },
    "hydralora": LOSSES | {"adapters.preset": "hydralora", **DENSE},
    "mola": LOSSES
    | {
        "adapters.preset": "mola",
        "adapters.num_experts": None,
        "adapters.experts_per_layer": [2, 4],
        "adapters.divergence_coefficient": 0.1,
    },
    "lora_moe": {
        "adapters.preset": "lora_moe",
        "adapters.localized_coefficient": 0.5,
        "adapters.localized_tasks": ["even"],
        **DENSE,
    },
    "shared_experts": LOSSES
    | {"adapters.shared_experts": 1, "adapters.learn_shared_weight": True, "adapters.path": "grouped"},
    "dora": {"adapters.dora": True, "adapters.dropout": 0.1},
    "warm_start": {
        "adapters.experts_from": ["@lora/adapter"],
        "adapters.start_noise": 0.1,
        "adapters.molora": [".*mlp.*_proj", ".*self_attn.*_proj"],
        "adapters.lora": [],
    },
    # Dropout, chance and number formats
    "dropout": LOSSES
    | TWO_PASSES
    | {
        "adapters.dropout": 0.1,
        "adapters.jitter": 0.1,
        "training.activation_checkpointing": "non_reentrant",
        "training.clip_norm": 0.5,
        "training.weight_decay": 0.01,
        "training.schedule": "linear",
        "training.warmup_ratio": 0.5,
    },
    "router_paths": LOSSES
    | {"adapters.selection": "sample", "adapters.dropout": 0.1, "training.router_paths": 3},
    "bf16": LOSSES | {"model.dtype": "bfloat16", "adapters.rank": 8, "adapters.path": "grouped"},
    # What tasks weigh
    "dwa": TWO_PASSES | {"training.loss.task_weights": "dwa", "training.loss.window": 1, "training.steps": 6},
    "uncertainty": {"training.loss.task_weights": "uncertainty", "training.loss.normalise": "token_mean"},
    "famo": {"training.loss.task_weights": "famo", "training.loss.normalise": "example_mean"},
    "surgery": TWO_PASSES | {"training.loss.surgery": "pcgrad", "data.batching": "grouped"},
    "mix_tokens": {
        "data.mix.by": "tokens",
        "data.mix.temperature_from": 1.0,
        "data.mix.temperature_blocks": 2,
        "data.mix.floor": 0.2,
        "data.tasks.even.weight": 2.0,
        "data.tasks.even.max_repeats": 1.0,
    },
    "mix_unimax": {"data.mix.rule": "unimax", "data.mix.epochs": 1.0, "run.seed": 5},
    "regret": MOVING | {"data.mix.dynamic.rule": "regret", "training.loss.task_weights": "famo"},
    "odm": MOVING | {"data.mix.dynamic.rule": "odm", "training.loss.task_weights": "dwa"},
    "doge": MOVING | {"data.mix.dynamic.rule": "doge"},
    "guard": MOVING
    | {
        "data.recipe": "@wrong",
        "data.mix.rule": "explicit",
        "data.mix.shares": {"even": 0.85, "last_word": 0.15},
        "data.mix.dynamic.rule": "regret",
        "data.mix.dynamic.every_blocks": 2,
        "training.learning_rate": 0.03,
        "training.schedule": "constant",
        "training.warmup_ratio": 0.0,
        "training.steps": 20,
        "training.guard.action": "reweight",
        "training.guard.patience": 1,
        "evaluation.every_steps": 2,
        "evaluation.loss_rows": 4,
        "checkpoint.every_steps": 11,
    },
}
RESUMED: dict[str, tuple[str, int]] = {"packed_resumed": ("packed", 4), "guard_resumed": ("guard", 11)}
"""Name -> the case that is played again from its checkpoint after so many steps: the same has to come out."""


def all_names() -> list[str]:
    """Every case, in the order in which they run: what another one needs comes before it."""
    return [*CASES, *RESUMED]


def settings_of(name: str) -> Settings:
    """Dotted key of the run file -> value."""
    origin = RESUMED[name][0] if name in RESUMED else name
    return COMMON | CASES[origin]


def needed_by(name: str) -> list[str]:
    """Cases whose folders this one reads."""
    folders = settings_of(name).get("adapters.experts_from", [])
    origin = [RESUMED[name][0]] if name in RESUMED else []
    return origin + [folder.removeprefix("@").removesuffix("/adapter") for folder in folders]


def with_needed(names: list[str]) -> list[str]:
    """The cases and those that they need, in the order in which they have to run."""
    wanted = set(names) | {other for name in names for other in needed_by(name)}
    return [name for name in all_names() if name in wanted]
