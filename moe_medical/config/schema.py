"""The run file as typed sections. Each key has one owner: what is here is not in the DeepSpeed JSON.

The dataclasses are OmegaConf structured configs: types and misspelt keys are checked on merge,
ranges and cross-field rules by `validate.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

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
RouterScope = Literal["module", "block", "layer", "model"]
Experts = Literal["linear", "block", "ffn"]
Selection = Literal["top_k", "sample"]
ComputePath = Literal["auto", "concat", "grouped", "triton"]
Quantization = Literal["none", "int8", "bnb8", "bnb4"]
Choices = Literal["generated", "likelihood"]
GuardAction = Literal["none", "reweight", "freeze", "stop"]
Surgery = Literal["none", "pcgrad", "upgrad", "imtl_g", "mgda", "aligned_mtl", "cagrad", "nash_mtl"]

MAX_PREFETCH_STEPS = 8
"""Steps that may be read ahead; a dynamic mixture changes none of them."""


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
class AdaptersSection:
    """Which linear layers get low-rank experts, and how they are routed. None takes the preset's value."""

    preset: str = "ming_moe"
    experts: Optional[Experts] = None
    """`linear`: low-rank experts in each linear layer; `block`: low-rank experts of a whole FFN block, each
    with its own activations (MixLoRA); `ffn`: full copies of the FFN block (Med-MoE)."""
    num_experts: Optional[int] = None
    experts_per_layer: Optional[list[int]] = None
    """Experts by depth, in equal bands of layers (MoLA), instead of `num_experts` everywhere."""
    router: Optional[str] = None
    """`token`: each token chooses; `task`: each task has its own weights; `joint`: both logits added;
    `sequence`: the prompt chooses for all its tokens; `threshold`: experts above a learned threshold;
    `hierarchical`: a softmax over groups, then within each; `xlora`: gates from a pass without adapters."""
    router_scope: Optional[RouterScope] = None
    """Modules that share one decision: each linear its own, those of one block, those of one layer; `model`
    shares the router's weights between all layers too."""
    router_bias: Optional[bool] = None
    top_k: Optional[int] = None
    """Experts that each token, or task, uses; 0 for all, a dense gate."""
    renormalise: Optional[bool] = None
    """Whether the gates of the chosen experts sum to 1; else they are their shares of the full softmax."""
    selection: Optional[Selection] = None
    """Of the chosen in training: the largest, or a sample without replacement; elsewhere the largest."""
    temperature: Optional[float] = None
    """Divides the router's logits."""
    jitter: Optional[float] = None
    """In training the router's input is multiplied by U(1 - jitter, 1 + jitter)."""
    groups: Optional[int] = None
    """Groups of experts of a hierarchical router."""
    unknown_task: Optional[str] = None
    """What a task gate does without a task: `mean` of the tasks' logits, `refuse`, or as the task named."""
    freeze_router: Optional[bool] = None
    """Keep the router as it was loaded from `router_from`."""
    router_from: Optional[str] = None
    """Folder of a fitted router, with its label map (`moe-medical router fit`)."""
    rank: Optional[int] = None
    rank_split: Optional[bool] = None
    """Whether `rank` is that of all experts together (MOELoRA) rather than of each."""
    shared_a: Optional[bool] = None
    """One A for all experts, each with its own B (HydraLoRA)."""
    shared_experts: Optional[int] = None
    """Experts that every token uses beside those it chose (the meta expert of Med-MoE)."""
    shared_weight: Optional[float] = None
    """Gate of the shared experts."""
    learn_shared_weight: Optional[bool] = None
    """Whether that gate is trained."""
    alpha: Optional[float] = None
    """Scaling of the delta is alpha / rank, or alpha / sqrt(rank) with `rs_lora`."""
    rs_lora: Optional[bool] = None
    """Rank-stabilised scaling."""
    dora: Optional[bool] = None
    """Weight-decomposed plain LoRA (layers of `lora` only: a token's gate would change the norm)."""
    init_std: Optional[float] = None
    """A starts normal with this deviation; 0 is kaiming-uniform. B starts at zero."""
    dropout: Optional[float] = None
    experts_from: Optional[list[str]] = None
    """Adapter folders to start from: one plain LoRA that all experts copy, or one for each expert."""
    start_noise: Optional[float] = None
    """Deviation of the noise on copies of one LoRA, relative to theirs: alike they would stay alike."""
    freeze_experts: Optional[bool] = None
    """Train routers and what shares no name with an expert only (X-LoRA)."""
    path: Optional[ComputePath] = None
    """How experts are computed: all at once, chosen ones grouped, fused kernels; `auto` decides by layer."""
    molora: Optional[list[str]] = None
    """Regular expressions; a linear whose full module name matches one gets routed experts. With `experts:
    block` or `ffn` they name the FFN blocks' linears, and each block is adapted whole."""
    lora: Optional[list[str]] = None
    """Regular expressions; a linear whose full module name matches one gets one plain LoRA."""
    balance_coefficient: Optional[float] = None
    """Weight of the load-balance loss E * sum_i f_i P_i, averaged over layers."""
    z_coefficient: Optional[float] = None
    """Weight of the router z-loss mean(logsumexp(logits)^2), averaged over layers."""
    entropy_coefficient: Optional[float] = None
    """Weight of the mean entropy of a token's softmax, averaged over layers: decided gates."""
    divergence_coefficient: Optional[float] = None
    """Weight of minus the generalised Jensen-Shannon divergence of the tokens' softmaxes (HMoRA)."""
    localized_coefficient: Optional[float] = None
    """Weight of LoRAMoE's localized balance: the squared coefficient of variation of weighted gates."""
    localized_delta: Optional[float] = None
    """Its weights are 1 + delta where task and expert are of one kind, else 1 - delta."""
    localized_tasks: Optional[list[str]] = None
    """Tasks of the first kind, whose experts are the first half; all others are of the second."""


@dataclass
class TaskOverride:
    """What a run changes about one task of its recipe."""

    weight: float = 1.0
    """Multiplies the task's share after the mixing rule."""
    max_repeats: Optional[float] = None
    """Epochs of the task at most; None takes the task's or the mixture's."""


@dataclass
class DynamicMixSection:
    """Shares that follow what the run measures: decided at block boundaries, in force from a later block."""

    rule: DynamicRule = "none"
    """`regret` answers the seesaw, `odm` follows the training loss (EXP3), `doge` the tasks' gradients."""
    every_blocks: int = 1
    """Blocks between two decisions."""
    rate: float = 1.0
    """Step size of a decision."""
    smoothing: float = 0.9
    """Of the measured rewards from decision to decision, in [0, 1): 0 keeps none of the past."""
    low: float = 0.25
    """A share is at least so many times the static rule's."""
    high: float = 4.0
    """A share is at most so many times the static rule's."""


@dataclass
class MixSection:
    """How tasks share the run."""

    rule: StaticRule = "temperature"
    by: Literal["examples", "tokens"] = "examples"
    """What a share counts: samples, or their tokens."""
    temperature: float = 2.0
    """Rules `temperature` and `cap`: a share is proportional to size ** (1 / temperature)."""
    temperature_from: Optional[float] = None
    """Temperature of the first block; goes in equal steps of 1 / temperature to `temperature`."""
    temperature_blocks: int = 16
    """Blocks over which it does."""
    cap: int = 16384
    """Rule `cap` (T5): a larger size counts as this one."""
    beta: float = 0.9999
    """Rule `effective_number`: n (1 - beta) / (1 - beta ** n) has to suit the sizes."""
    epochs: float = 4.0
    """Rule `unimax`: epochs of any task at most."""
    shares: dict[str, float] = field(default_factory=dict)
    """Rule `explicit`: task -> share, on any scale; all tasks of the recipe."""
    floor: float = 0.0
    """Least share of any task with a positive weight."""
    ceiling: float = 1.0
    """Largest share of any task."""
    max_repeats: Optional[float] = 4.0
    """Epochs of any task at most, under every rule; its excess share flows to the others."""
    block: int = 1024
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
    workers: int = 1
    """Background threads that read, tokenise and pack; 0 does it between the steps."""
    prefetch_steps: int = 4
    """Steps that are made ready ahead, at most."""
    cache: TokenCache = "auto"
    """Keep a task's tokens on disk: `auto` where the ranks would otherwise make more of them as they go."""
    max_length: int = 512
    """Tokens of a sample at most; the prompt's middle is cut, never the target."""
    system_prompt: Optional[str] = "You are a medical expert. Answer exactly and briefly."
    """First message of the chat; null leaves it to the model's own template."""
    max_bad_fraction: float = 0.001
    """Share of unusable records per file above which the run refuses to start."""


@dataclass
class LossSection:
    """How token losses become one number. The defaults keep the mixture's shares and nothing else."""

    normalise: Normalise = "task_token_mean"
    """`task_token_mean`: a task counts by its samples, however long their answers; `token_mean`: by its
    target tokens; `example_mean`: each sample is the mean of its own tokens."""
    task_weights: TaskWeighting = "none"
    """Weights that follow the tasks' losses."""
    temperature: float = 2.0
    """Of `dwa`: larger is more even."""
    window: int = 50
    """Of `dwa`: steps over which it averages a loss before it compares."""
    rate: float = 0.025
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
    patience: int = 2
    factor: float = 0.5


@dataclass
class TrainingSection:
    """Length, batch and optimiser."""

    steps: int = 1000
    """Optimizer steps."""
    global_batch: int = 32
    """Samples per optimizer step over all ranks; accumulation steps follow from it."""
    micro_batch: int = 8
    """Rows per forward pass of one rank: samples, or packed rows of several samples."""
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    """Global gradient norm at most; 0 turns clipping off."""
    balance_over: Literal["global_batch", "micro_batch"] = "global_batch"
    """Tokens over which the routers' losses take their statistics. `global_batch` costs a second forward pass
    when there are accumulation steps; `micro_batch` counts those that all ranks have at once."""
    loss: LossSection = field(default_factory=LossSection)
    guard: GuardSection = field(default_factory=GuardSection)
    activation_checkpointing: Checkpointing = "none"
    """Keep only each block's input and compute the rest again in backward."""
    router_paths: int = 1
    """MING's multi-path loss: forward passes with experts sampled anew, of which each sample counts one."""
    router_paths_reduce: Literal["min", "mean"] = "min"
    """Of the passes of a sample: its smallest loss, or their mean."""
    compile: bool = False
    """Compile the base model's blocks with torch.compile."""


@dataclass
class ParallelSection:
    """Ranks and how the state is spread over them."""

    ranks: int = 1
    """Processes that `moe-medical launch` starts on this machine; a launcher's own number wins."""
    deepspeed: str = "???"
    """DeepSpeed JSON (ds_configs/ has them), relative to the run file: ZeRO stage, offload, buckets."""
    ep_size: int = 1
    """Ranks over which the experts of a layer are spread."""
    exchange: Exchange = "auto"
    """Under ep_size > 1, what travels: `tokens` to their experts, the experts' `weights` to the tokens, or
    `auto`, the fewer bytes of the two for each layer. All give the same numbers."""
    keep_gathered: bool = False
    """Whether gathered weights stay for backward; otherwise they are freed and gathered again."""
    overlap: bool = True
    """Gather the next layer's weights while this one computes; false for debugging. ZeRO-3 does its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_seconds: int = 600
    """A collective that waits longer means a lost peer."""


@dataclass
class EvaluationSection:
    """Loss and scores on a fixed probe set of every task."""

    split: Literal["validation", "test"] = "validation"
    loss_rows: int = 32
    """Rows per task for the teacher-forced loss."""
    score_rows: int = 16
    """Rows per task that are generated and scored; 0 turns scores off."""
    scores: Literal["ends", "always"] = "ends"
    """Whether evaluations in mid-run make answers too; `ends` makes them before and after only, as answers
    cost more than losses and tell less."""
    max_new_tokens: int = 32
    choices: Choices = "generated"
    """How a row with listed options is answered: by generated text, or by its likeliest option."""
    resamples: int = 1000
    """Bootstrap resamples of the rows behind the 95 % interval of each score; 0 gives none."""
    batch_rows: int = 16
    """Rows per forward pass of one rank."""
    every_steps: int = 500
    """Evaluate each time so many steps are done; 0 means only before and after."""


@dataclass
class CheckpointSection:
    """Portable checkpoints."""

    every_steps: int = 100
    """0 means only at the end."""
    keep: int = 2
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

    gate: float = 0.002
    """Least change of a task's loss, relative to it, that counts; twice its paired standard error must be
    passed as well."""
    window: int = 10
    """Evaluations over which gains and regressions add up."""
    worst: float = 0.25
    """Share of the tasks behind the mean of the worst."""
    reference: Optional[str] = None
    """File that `moe-medical baseline` has written, relative to the run file: single-task losses."""


@dataclass
class TrackingSection:
    log_every_steps: int = 1
    seesaw: SeesawSection = field(default_factory=SeesawSection)
    conflict_every_steps: int = 500
    """Steps between two looks at the angles between the tasks' gradients; 0 never looks."""
    conflict_rows: int = 4
    """Training rows of each task whose gradient is looked at."""
    routing_every_steps: int = 50
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
    adapters: AdaptersSection = field(default_factory=AdaptersSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
