"""`router fit`: routers fitted to labels before training, on what they will see at run time.

    run file -> frozen base over training rows -> features of each router -> linear classifier -> a folder

Decisions:
- A router's features are the input of the first routed module of its scope, at its own depth: of every token,
  or the mean over the prompt for `adapters.router: sequence`. Med-MoE's were means over all layers, which
  no router ever sees. Where the scope is the model, the features of all layers train the one pair of weights.
- Adapters start as the base, so the base alone makes the features.
- Rows are drawn evenly over the tasks of a label; a fifth of each label's is held out, whole rows, for the
  accuracies. Of a row at most 16 tokens count, evenly spread, so that long rows do not drown short ones.
- Features are standardised for the fit, and that is folded back into W and b. No bias where the run's routers
  have none; then features are scaled and not shifted.
- Features lie in memory: rows x tokens x D x routers floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from moe_medical.adapters.fitted_router import FittedRouter, refuse_other_folder, save_router
from moe_medical.adapters.model import adaptable_modules
from moe_medical.adapters.placement import match_modules, routing_scopes
from moe_medical.base_model import BaseModel, locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import MoloraConfig, RunConfig, load_config
from moe_medical.console import progress_line, show, show_table
from moe_medical.data.batches import Batch, collate
from moe_medical.data.chat import ChatFormat, Encoded
from moe_medical.data.tasks import TaskData, load_tasks
from moe_medical.distributed.topology import start_alone
from moe_medical.errors import ConfigError, Problem
from moe_medical.evaluation.loss import run_model
from moe_medical.planning.preflight import check_context
from moe_medical.training.router_labels import label_tasks

TOKENS_OF_A_ROW = 16
_HELD_OUT = 0.2
_MAX_ITERATIONS = 300


def fit_router(run: Path, overrides: Sequence[str], out: Path, labels: str = "task", rows: int = 256) -> None:
    """Fit a run's routers to labels, show how well they know them, and write a folder for `router_from`.

    Args:
        run: Run file; that it wants a fitted router, which is not there yet, does not matter.
        overrides: Over the run file.
        out: Folder to write.
        labels: What the experts stand for; see `router_labels.py`.
        rows: Training rows of each label at most.

    Raises:
        ConfigError: The run has no linear router, or another number of experts than of labels; `out` holds
            something else; a label has too few rows.
    """
    refuse_other_folder(out)
    config = load_config(run, [*overrides, "adapters.router_from=null", "adapters.freeze_router=false"])
    adapters = config.adapters
    base = locate_base(config.model)
    check_context(config, base)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    tasks = load_tasks(config.data, config.evaluation.split, chat)
    label_of_task, order = label_tasks(labels, [task.spec for task in tasks])
    _check(adapters, order)
    drawn = _draw(tasks, label_of_task, order, rows, config.run.seed)
    features = _features(config, base, chat, adapters, drawn)
    fitted = _fit_all(features, drawn, adapters, config.run.seed)
    router = _as_router(fitted, base, adapters, label_of_task, order, drawn)
    save_router(out, router)
    _tell(router)
    show(f"written {out}")


def _check(adapters: MoloraConfig, order: Sequence[str]) -> None:
    problems = []
    if not adapters.router_kind.can_be_fitted:
        rule = "must be token or sequence: only a linear router can be fitted"
        problems.append(Problem("adapters.router", rule, adapters.router))
    if adapters.experts_per_layer:
        rule = "must be empty: each expert stands for a label at every depth"
        problems.append(Problem("adapters.experts_per_layer", rule, list(adapters.experts_per_layer)))
    elif adapters.num_experts != len(order):
        rule = f"must be {len(order)}, one for each label ({', '.join(order)})"
        problems.append(Problem("adapters.num_experts", rule, adapters.num_experts))
    if problems:
        raise ConfigError("the run file", problems)


# Rows


@dataclass(frozen=True)
class _Row:
    """A training row that features are taken of."""

    encoded: Encoded
    label: int
    held_out: bool


def _draw(
    tasks: Sequence[TaskData], label_of_task: Mapping[str, str], order: Sequence[str], rows: int, seed: int
) -> list[_Row]:
    """Up to `rows` rows of each label, as evenly from its tasks as they have them; every fifth held out."""
    generator = np.random.default_rng(seed)
    drawn = []
    problems = []
    for number, label in enumerate(order):
        mine = [task for task in tasks if label_of_task[task.name] == label]
        encoded = [
            row
            for task, share in zip(mine, _shares([len(task.train) for task in mine], rows), strict=True)
            for row in task.tokens.encoded(sorted(generator.choice(len(task.train), share, False).tolist()))
        ]
        if len(encoded) < 2:
            problems.append(Problem(label, "must have two training rows at least", len(encoded)))
            continue
        held_out = set(
            generator.permutation(len(encoded))[: max(1, round(_HELD_OUT * len(encoded)))].tolist()
        )
        drawn += [_Row(row, number, i in held_out) for i, row in enumerate(encoded)]
    if problems:
        raise ConfigError("the labels", problems)
    return drawn


def _shares(sizes: Sequence[int], rows: int) -> list[int]:
    """`rows` split over tasks of these sizes, evenly as far as they go."""
    shares = [0] * len(sizes)
    left = rows
    for done, i in enumerate(sorted(range(len(sizes)), key=lambda i: sizes[i])):
        shares[i] = min(sizes[i], left // (len(sizes) - done))
        left -= shares[i]
    return shares


# Features


def _features(
    config: RunConfig, base: BaseModel, chat: ChatFormat, adapters: MoloraConfig, drawn: Sequence[_Row]
) -> dict[str, list[Tensor]]:
    """First module of each router's scope -> (vectors, D) float32 of each row."""
    topology = start_alone(config.parallel)
    model = load_base(base, config.model.dtype, config.model.quantization).to(topology.device).eval()
    heads = _heads(model, adapters)
    of_prompts = adapters.router_kind.decides_per == "prompt"
    found = {name: [torch.empty(0)] * len(drawn) for name in heads}
    shown = [_shown(row.encoded, of_prompts) for row in drawn]
    order = sorted(range(len(shown)), key=lambda i: len(shown[i].input_ids))
    size = config.evaluation.batch_rows
    with progress_line("reading features", len(drawn), visible=True) as progress:
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            batch = collate([shown[i] for i in numbers], [0] * len(numbers), chat.pad_id).to(topology.device)
            for name, inputs_BSD in _inputs(model, heads, batch).items():
                for i, x_SD, mask_S in zip(numbers, inputs_BSD, batch.token_mask_BS, strict=True):
                    found[name][i] = _vectors(x_SD[mask_S].float(), of_prompts).cpu()
            progress.advance(len(numbers))
    return found


@torch.no_grad()
def _inputs(model: nn.Module, names: Sequence[str], batch: Batch) -> dict[str, Tensor]:
    """What these modules get in a forward pass, (B, S, D)."""
    last = torch.tensor([batch.input_ids_BS.shape[1] - 1], device=batch.input_ids_BS.device)
    with _watched(model, names) as inputs:
        run_model(model, batch, logits_to_keep=last)
    return inputs


def _vectors(tokens_SD: Tensor, of_prompts: bool) -> Tensor:
    """Of one row: its mean, or some of its tokens, evenly spread."""
    if of_prompts:
        return tokens_SD.mean(0, keepdim=True)
    places = torch.linspace(0, len(tokens_SD) - 1, min(TOKENS_OF_A_ROW, len(tokens_SD)))
    return tokens_SD[places.round().long().to(tokens_SD.device)]


def _heads(model: nn.Module, adapters: MoloraConfig) -> list[str]:
    """Name of the module before whose input each scope decides."""
    placement = match_modules(adaptable_modules(model), adapters)
    routed = [name for name, kind in placement.items() if kind == "molora"]
    if adapters.experts != "linear":
        return list(dict.fromkeys(name.rpartition(".")[0] for name in routed))
    first: dict[str, str] = {}
    for name, scope in routing_scopes(routed, adapters.router_scope).items():
        first.setdefault(scope, name)
    return list(first.values())


@contextmanager
def _watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Module -> its input in the forward pass that is made inside, (B, S, D)."""
    inputs: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return model.get_submodule(name).register_forward_pre_hook(keep)

    hooks = [watch(name) for name in names]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _shown(row: Encoded, of_prompts: bool) -> Encoded:
    """What the base model reads: the whole sample, or its prompt."""
    if not of_prompts:
        return row
    return Encoded(row.input_ids[: row.num_prompt_tokens], row.num_prompt_tokens, row.num_truncated)


# Fitting


@dataclass(frozen=True)
class _Fitted:
    """One router, and how it does on rows that it was not fitted on."""

    weight_ED: Tensor
    bias_E: Tensor | None
    accuracy: float
    label_accuracy: tuple[float, ...]


def _fit_all(
    features: Mapping[str, Sequence[Tensor]], drawn: Sequence[_Row], adapters: MoloraConfig, seed: int
) -> dict[str, _Fitted]:
    """First module of each router's scope -> its router; one of all features where the model is the scope."""
    if adapters.router_scope == "model":
        of_rows = zip(*features.values(), strict=True)
        features = {next(iter(features)): [torch.cat(of_row) for of_row in of_rows]}
    fitted = {}
    with progress_line("fitting routers", len(features), visible=True) as progress:
        for name, rows in features.items():
            fitted[name] = _fit(rows, drawn, adapters, seed)
            progress.advance(1, f"held-out accuracy {fitted[name].accuracy:.3f}")
    return fitted


def _fit(rows: Sequence[Tensor], drawn: Sequence[_Row], adapters: MoloraConfig, seed: int) -> _Fitted:
    sizes = [len(vectors) for vectors in rows]
    labels = np.repeat([row.label for row in drawn], sizes)
    held_out = np.repeat([row.held_out for row in drawn], sizes)
    x_ND = torch.cat(list(rows)).double().numpy()
    weight, bias = _classifier(x_ND[~held_out], labels[~held_out], adapters.router_bias, seed)
    right = (x_ND[held_out] @ weight.T + bias).argmax(1) == labels[held_out]
    of_label = [float(right[labels[held_out] == label].mean()) for label in range(adapters.num_experts)]
    bias_E = torch.from_numpy(bias).float() if adapters.router_bias else None
    return _Fitted(torch.from_numpy(weight).float(), bias_E, float(np.mean(of_label)), tuple(of_label))


def _classifier(
    x_ND: np.ndarray, labels_N: np.ndarray, with_bias: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """W (E, D) and b (E,) of a softmax classifier of the features as they are; b is zero where not wanted."""
    mean_D = x_ND.mean(0) if with_bias else np.zeros(x_ND.shape[1])
    scale_D = np.sqrt(np.square(x_ND - mean_D).mean(0)) + 1e-6
    model = LogisticRegression(
        fit_intercept=with_bias, class_weight="balanced", max_iter=_MAX_ITERATIONS, random_state=seed
    )
    model.fit((x_ND - mean_D) / scale_D, labels_N)
    weight_ED = model.coef_
    bias_E = np.broadcast_to(model.intercept_, len(model.coef_))
    if len(model.classes_) == 2:  # one logit z for the second label: a softmax over (-z / 2, z / 2)
        weight_ED = np.outer([-0.5, 0.5], weight_ED)
        bias_E = np.outer([-0.5, 0.5], bias_E)[:, 0]
    weight_ED = weight_ED / scale_D
    return weight_ED, bias_E - weight_ED @ mean_D


# Telling


def _as_router(
    fitted: Mapping[str, _Fitted],
    base: BaseModel,
    adapters: MoloraConfig,
    label_of_task: Mapping[str, str],
    order: Sequence[str],
    drawn: Sequence[_Row],
) -> FittedRouter:
    tensors = {f"{name}.router.weight": of.weight_ED for name, of in fitted.items()}
    tensors |= {f"{name}.router.bias": of.bias_E for name, of in fitted.items() if of.bias_E is not None}
    counts = Counter(order[row.label] for row in drawn)
    return FittedRouter(
        labels=tuple(order),
        tensors=tensors,
        level=adapters.router,
        scope=adapters.router_scope,
        base_model=base.name,
        base_revision=base.revision,
        label_of_task=dict(label_of_task),
        accuracy={name: of.accuracy for name, of in fitted.items()},
        label_accuracy={n: dict(zip(order, of.label_accuracy, strict=True)) for n, of in fitted.items()},
        rows={label: counts[label] for label in order},
    )


def _tell(router: FittedRouter) -> None:
    rows = [
        (name, f"{accuracy:.3f}", *(f"{router.label_accuracy[name][label]:.3f}" for label in router.labels))
        for name, accuracy in router.accuracy.items()
    ]
    show_table(("router, on held-out rows", "accuracy", *router.labels), rows)
