"""The run file as typed sections. Each key has one owner: what is here is not in the DeepSpeed JSON.

The dataclasses are OmegaConf structured configs: types and misspelt keys are checked on merge,
ranges, which stand beside the fields, and cross-field rules by `rules.py`. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, Optional

from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.ranges import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, SHARE, within

Dtype = Literal["float32", "bfloat16"]
ResumeMode = Literal["auto", "must", "never"]
Exchange = Literal["auto", "tokens", "weights"]
Checkpointing = Literal["none", "non_reentrant", "reentrant"]
StaticRule = Literal[
    "temperature", "proportional", "uniform", "cap", "effective_number", "unimax", "explicit"
]
DynamicRule = Literal["none", "regret", "odm", "doge"]
Batching = Literal["packed", "grouped", "padded"]
TokenCache = Literal["auto", "always", "never"]
Normalise = Literal["task_token_mean", "token_mean", "example_mean"]
TaskWeighting = Literal["none", "dwa", "uncertainty", "famo"]
Quantization = Literal["none", "int8", "bnb8", "bnb4"]
Choices = Literal["generated", "likelihood"]
GuardAction = Literal["none", "reweight", "freeze", "stop"]
Surgery = Literal["none", "pcgrad", "upgrad", "imtl_g", "mgda", "aligned_mtl", "cagrad", "nash_mtl"]

MAX_PREFETCH_STEPS = 8
"""Steps that may be read ahead; a dynamic mixture changes none of them."""
_CAP = within("must be > 0 or null", lambda v: v > 0)
_BETAS = within("must be two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v))


@dataclass
class RunSection:
    """What the run is called and where it writes."""

    name: str = "run"
    dir: str = "runs/${run.name}"
    """Folder of everything the run writes; relative to the working folder."""
    seed: int = 17


@dataclass
class ModelSection:
    """The frozen base LLM."""

    name: str = "smollm2-135m"
    """`smollm2-135m` (embedded), a local folder, or a Hugging Face hub id. Safetensors only."""
    revision: Optional[str] = None
    """Commit, tag or branch of a hub id; pin a commit for a run that must be repeatable."""
    dtype: Dtype = "float32"
    """Storage and compute type of the frozen base; adapters and routers stay float32."""
    quantization: Quantization = "none"
    """Of the frozen base's linears: `int8` weight-only (torchao); `bnb8` or `bnb4` (bitsandbytes, a GPU)."""


@dataclass
class TaskOverride:
    """What a run changes about one task of its recipe."""

    weight: float = field(
        default=1.0, metadata=within("must be finite and not negative", lambda v: 0 <= v < math.inf)
    )
    """Multiplies the task's share after the mixing rule."""
    max_repeats: Optional[float] = field(default=None, metadata=_CAP)
    """Epochs of the task at most; None takes the task's or the mixture's."""


@dataclass
class DynamicMixSection:
    """Shares that follow what the run measures: decided at block boundaries, in force from a later block."""

    rule: DynamicRule = "none"
    """`regret` answers the seesaw, `odm` follows the training loss (EXP3), `doge` the tasks' gradients."""
    every_blocks: int = field(default=1, metadata=AT_LEAST_ONE)
    """Blocks between two decisions."""
    rate: float = field(default=1.0, metadata=POSITIVE)
    """Step size of a decision."""
    smoothing: float = field(default=0.9, metadata=SHARE)
    """Of the measured rewards from decision to decision, in [0, 1): 0 keeps none of the past."""
    low: float = field(default=0.25, metadata=within("must be > 0 and at most 1", lambda v: 0 < v <= 1))
    """A share is at least so many times the static rule's."""
    high: float = field(
        default=4.0, metadata=within("must be finite and at least 1", lambda v: 1 <= v < math.inf)
    )
    """A share is at most so many times the static rule's."""


@dataclass
class MixSection:
    """How tasks share the run."""

    rule: StaticRule = "temperature"
    by: Literal["examples", "tokens"] = "examples"
    """What a share counts: samples, or their tokens."""
    temperature: float = field(default=2.0, metadata=POSITIVE)
    """Rules `temperature` and `cap`: a share is proportional to size ** (1 / temperature)."""
    temperature_from: Optional[float] = field(
        default=None, metadata=within("must be finite and > 0, or null", lambda v: 0 < v < math.inf)
    )
    """Temperature of the first block; goes in equal steps of 1 / temperature to `temperature`."""
    temperature_blocks: int = field(default=16, metadata=AT_LEAST_ONE)
    """Blocks over which it does."""
    cap: int = field(default=16384, metadata=AT_LEAST_ONE)
    """Rule `cap` (T5): a larger size counts as this one."""
    beta: float = field(default=0.9999, metadata=within("must be between 0 and 1", lambda v: 0 < v < 1))
    """Rule `effective_number`: n (1 - beta) / (1 - beta ** n) has to suit the sizes."""
    epochs: float = field(default=4.0, metadata=POSITIVE)
    """Rule `unimax`: epochs of any task at most."""
    shares: dict[str, float] = field(default_factory=dict)
    """Rule `explicit`: task -> share, on any scale; all tasks of the recipe."""
    floor: float = field(default=0.0, metadata=SHARE)
    """Least share of any task with a positive weight."""
    ceiling: float = 1.0
    """Largest share of any task."""
    max_repeats: Optional[float] = field(default=4.0, metadata=_CAP)
    """Epochs of any task at most, under every rule; its excess share flows to the others."""
    block: int = field(default=1024, metadata=AT_LEAST_ONE)
    """Samples over which shares are exact."""
    dynamic: DynamicMixSection = field(default_factory=DynamicMixSection)


@dataclass
class DataSection:
    """The mixture and how records become tokens."""

    recipe: str = "???"
    """Mixture YAML, relative to the run file."""
    tasks: dict[str, TaskOverride] = field(default_factory=dict)
    only: list[str] = field(default_factory=list)
    """Tasks of the recipe that are trained and evaluated; empty takes all. `hygiene` still looks at all."""
    mix: MixSection = field(default_factory=MixSection)
    batching: Batching = "packed"
    """`packed`: several samples in a row, kept apart by their positions; `grouped`: samples of like length
    padded to the longest; `padded`: samples in the mixture's order. All train on the same samples."""
    pack_length: Optional[int] = None
    """Tokens of a packed row at most; null takes max_length."""
    workers: int = field(default=1, metadata=NOT_NEGATIVE)
    """Background threads that read, tokenise and pack; 0 does it between the steps."""
    prefetch_steps: int = field(
        default=4,
        metadata=within(f"must be from 1 to {MAX_PREFETCH_STEPS}", lambda v: 1 <= v <= MAX_PREFETCH_STEPS),
    )
    """Steps that are made ready ahead, at most."""
    cache: TokenCache = "auto"
    """Keep a task's tokens on disk: `auto` where the ranks would otherwise make more of them as they go."""
    max_length: int = field(default=512, metadata=within("must be at least 32", lambda v: v >= 32))
    """Tokens of a sample at most; the prompt's middle is cut, never the target."""
    system_prompt: Optional[str] = "You are a medical expert. Answer exactly and briefly."
    """First message of the chat; null leaves it to the model's own template."""
    max_bad_fraction: float = field(default=0.001, metadata=SHARE)
    """Share of unusable records per file above which the run refuses to start."""


@dataclass
class LossSection:
    """How token losses become one number. The defaults keep the mixture's shares and nothing else."""

    normalise: Normalise = "task_token_mean"
    """`task_token_mean`: a task counts by its samples, however long their answers; `token_mean`: by its
    target tokens; `example_mean`: each sample is the mean of its own tokens."""
    task_weights: TaskWeighting = "none"
    """Weights that follow the tasks' losses."""
    temperature: float = field(default=2.0, metadata=POSITIVE)
    """Of `dwa`: larger is more even."""
    window: int = field(default=50, metadata=AT_LEAST_ONE)
    """Of `dwa`: steps over which it averages a loss before it compares."""
    rate: float = field(default=0.025, metadata=within("must be in (0, 1]", lambda v: 0 < v <= 1))
    """Step size of `uncertainty` and `famo`."""
    surgery: Surgery = "none"
    """Combine the tasks' gradients with `torchjd` (extra `surgery`): one backward pass per task."""


@dataclass
class GuardSection:
    """What happens to a task that overfits: beyond its first epoch its evaluation loss has left its best by
    more than noise, `patience` evaluations in a row, while its training loss falls."""

    action: GuardAction = "none"
    """`reweight` multiplies its loss by `factor`, `freeze` takes it out of the mixture, `stop` ends the run
    with a checkpoint."""
    patience: int = field(default=2, metadata=AT_LEAST_ONE)
    factor: float = field(default=0.5, metadata=within("must be in (0, 1)", lambda v: 0 < v < 1))


@dataclass
class TrainingSection:
    """Length, batch and optimiser."""

    steps: int = field(default=1000, metadata=AT_LEAST_ONE)
    """Optimizer steps."""
    global_batch: int = field(default=32, metadata=AT_LEAST_ONE)
    """Samples per optimizer step over all ranks; accumulation steps follow from it."""
    micro_batch: int = field(default=8, metadata=AT_LEAST_ONE)
    """Rows per forward pass of one rank: samples, or packed rows of several samples."""
    learning_rate: float = field(default=2e-4, metadata=POSITIVE)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = field(default=0.03, metadata=SHARE)
    weight_decay: float = field(default=0.0, metadata=NOT_NEGATIVE)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=_BETAS)
    epsilon: float = field(default=1e-8, metadata=POSITIVE)
    clip_norm: float = field(default=1.0, metadata=NOT_NEGATIVE)
    """Global gradient norm at most; 0 turns clipping off."""
    balance_over: Literal["global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the routers' losses take their statistics. `global_batch` costs a second forward pass
    when there are accumulation steps; `micro_batch` counts those that all ranks have at once."""
    loss: LossSection = field(default_factory=LossSection)
    guard: GuardSection = field(default_factory=GuardSection)
    activation_checkpointing: Checkpointing = "none"
    """Keep only each block's input and compute the rest again in backward."""
    router_paths: int = field(default=1, metadata=AT_LEAST_ONE)
    """MING's multi-path loss: forward passes with experts sampled anew, of which each sample counts one."""
    router_paths_reduce: Literal["min", "mean"] = "min"
    """Of the passes of a sample: its smallest loss, or their mean."""
    compile: bool = False
    """Compile the base model's blocks with torch.compile."""


@dataclass
class ParallelSection:
    """Ranks and how the state is spread over them."""

    ranks: int = field(default=1, metadata=AT_LEAST_ONE)
    """Processes that `moe-medical launch` starts on this machine; a launcher's own number wins."""
    deepspeed: str = "???"
    """DeepSpeed JSON (ds_configs/ has them), relative to the run file: ZeRO stage, offload, buckets."""
    ep_size: int = field(default=1, metadata=AT_LEAST_ONE)
    """Ranks over which the experts of a layer are spread."""
    exchange: Exchange = "auto"
    """Under ep_size > 1, what travels: `tokens` to their experts, the experts' `weights` to the tokens, or
    `auto`, the fewer bytes of the two for each layer. All give the same numbers."""
    keep_gathered: bool = False
    """Whether gathered weights stay for backward; otherwise they are freed and gathered again."""
    overlap: bool = True
    """Gather the next layer's weights while this one computes; false for debugging. ZeRO-3 does its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: int = field(default=600, metadata=AT_LEAST_ONE)
    """A collective that waits longer means a lost peer."""


@dataclass
class EvaluationSection:
    """Loss and scores on a fixed probe set of every task."""

    split: Literal["validation", "test"] = "validation"
    loss_rows: int = field(default=32, metadata=AT_LEAST_ONE)
    """Rows per task for the teacher-forced loss."""
    score_rows: int = field(default=16, metadata=NOT_NEGATIVE)
    """Rows per task that are generated and scored; 0 turns scores off."""
    scores: Literal["ends", "always"] = "ends"
    """Whether evaluations in mid-run make answers too; `ends` makes them before and after only, as answers
    cost more than losses and tell less."""
    max_new_tokens: int = field(default=32, metadata=AT_LEAST_ONE)
    choices: Choices = "generated"
    """How a row with listed options is answered: by generated text, or by its likeliest option."""
    resamples: int = field(default=1000, metadata=NOT_NEGATIVE)
    """Bootstrap resamples of the rows behind the 95 % interval of each score; 0 gives none."""
    batch_rows: int = field(default=16, metadata=AT_LEAST_ONE)
    """Rows per forward pass of one rank."""
    every_steps: int = field(default=500, metadata=NOT_NEGATIVE)
    """Evaluate each time so many steps are done; 0 means only before and after."""


@dataclass
class CheckpointSection:
    """Portable checkpoints."""

    every_steps: int = field(default=100, metadata=NOT_NEGATIVE)
    """0 means only at the end."""
    keep: int = field(default=2, metadata=AT_LEAST_ONE)
    resume: ResumeMode = "auto"
    accept_data_change: bool = False
    """Go on although files of the mixture have changed since the checkpoint; the run is marked."""


@dataclass
class WandbSection:
    """W&B follows metrics.jsonl; offline when no key is found."""

    enabled: bool = True
    project: str = "moe-medical"
    entity: Optional[str] = None
    mode: Literal["auto", "online", "offline"] = "auto"
    group: Optional[str] = None
    """Runs of one group are shown together; null takes run.name."""
    tags: list[str] = field(default_factory=list)
    alerts: bool = True
    """Tell of collapsed routers, regressed tasks and decisions."""


@dataclass
class SeesawSection:
    """What counts as one task paying for another."""

    gate: float = field(default=0.002, metadata=SHARE)
    """Least change of a task's loss, relative to it, that counts; twice its paired standard error must be
    passed as well."""
    window: int = field(default=10, metadata=AT_LEAST_ONE)
    """Evaluations over which gains and regressions add up."""
    worst: float = field(default=0.25, metadata=within("must be in (0, 1]", lambda v: 0 < v <= 1))
    """Share of the tasks behind the mean of the worst."""
    reference: Optional[str] = None
    """File that `moe-medical baseline` has written, relative to the run file: single-task losses."""


@dataclass
class TrackingSection:
    log_every_steps: int = field(default=1, metadata=AT_LEAST_ONE)
    seesaw: SeesawSection = field(default_factory=SeesawSection)
    conflict_every_steps: int = field(default=500, metadata=NOT_NEGATIVE)
    """Steps between two looks at the angles between the tasks' gradients; 0 never looks."""
    conflict_rows: int = field(default=4, metadata=AT_LEAST_ONE)
    """Training rows of each task whose gradient is looked at."""
    routing_every_steps: int = field(default=50, metadata=NOT_NEGATIVE)
    """Steps between two counts of which task uses which expert; 0 never counts."""
    sinks: list[str] = field(default_factory=list)
    """Besides metrics.jsonl and W&B: `tensorboard`, `trackio`."""
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class PrivacySection:
    allow_text: bool = False
    """Whether prompts, answers and targets of records may be written, by `moe-medical eval --predictions`."""


@dataclass
class RunConfig:
    """One file, one run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    adapters: MoloraConfig = field(default_factory=MoloraConfig)
    """None takes the preset's value."""
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
