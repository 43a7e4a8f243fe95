"""The language-model loss, task by task.

A step's loss is a weighted sum over the target tokens of the *global* step. With N_i of them in n_i samples
of task i, n = sum_i n_i, and m_s in sample s, the weight of a token of sample s of task i is u_i times

    task_token_mean   n_i / (n N_i)     each task its mean per token, and the mixture's share of samples: long
                                        answers do not drown short ones (the default)
    token_mean        1 / sum_j N_j     each token alike
    example_mean      1 / (n m_s)       each sample its mean per token

u_i is 1 unless the run weighs its tasks. All counts are summed over ranks and micro-batches before the first
backward, so that the loss depends on neither, nor on how samples are laid out in rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from moe_medical.adapters.routing import BatchInputs, RoutingContext, Sequences
from moe_medical.config.schema import Normalise
from moe_medical.data.batches import IGNORE, Batch

Forward = Callable[..., Any]
"""A causal LM, or an engine around one."""


@dataclass(frozen=True)
class TaskSums:
    """Sums of one batch over its tasks, each of shape (num_tasks,)."""

    loss: torch.Tensor
    tokens: torch.Tensor
    rows: torch.Tensor

    def numpy(self) -> np.ndarray:
        """Shape (3, num_tasks), float64: loss, tokens, rows."""
        return torch.stack([self.loss.double(), self.tokens.double(), self.rows.double()]).cpu().numpy()


class TokenLosses(NamedTuple):
    """One entry for each target token of a batch."""

    losses: torch.Tensor
    """float32 cross-entropies, nats."""
    task_ids: torch.Tensor
    sample_targets: torch.Tensor
    """Target tokens of the token's sample."""
    rows: torch.Tensor
    """Row of the batch that the token is in."""


def forward_context(
    context: RoutingContext, batch: Batch, pass_name: str = "train"
) -> AbstractContextManager[RoutingContext]:
    """What the layers must know of a micro-batch while it runs: padding, tasks, samples and their prompts.

    Must span forward and backward. See `RoutingContext.bind`.
    """
    return context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS, sequences_of(batch)), pass_name)


def sequences_of(batch: Batch) -> Sequences:
    """The samples of a batch and their prompts."""
    return Sequences.of(batch.position_ids_BS, batch.prompt_mask_BS)


def token_losses(forward: Forward, batch: Batch) -> TokenLosses:
    """Cross-entropy of each target token; only columns before a target go through the language-model head."""
    columns = batch.target_columns_C
    logits = run_model(forward, batch, logits_to_keep=columns - 1)
    labels = batch.labels_BS[:, columns]
    supervised = labels != IGNORE
    losses = F.cross_entropy(logits[supervised].float(), labels[supervised], reduction="none")
    task_ids = batch.task_ids_BS[:, columns]
    targets = batch.sample_targets_BS[:, columns]
    rows = supervised.nonzero()[:, 0]
    return TokenLosses(losses, task_ids[supervised], targets[supervised], rows)


def run_model(forward: Forward, batch: Batch, logits_to_keep: torch.Tensor) -> torch.Tensor:
    """Logits of the columns `logits_to_keep`, shape (B, columns, vocabulary)."""
    logits: torch.Tensor = forward(
        input_ids=batch.input_ids_BS,
        # With a mask, transformers would not look for samples that start again in the positions.
        attention_mask=None if batch.packed else batch.token_mask_BS,
        position_ids=batch.position_ids_BS,
        use_cache=False,
        logits_to_keep=logits_to_keep,
    ).logits
    return logits


def row_sums(tokens: TokenLosses, num_rows: int) -> np.ndarray:
    """Summed loss and target tokens of each row of a batch; float64, shape (2, num_rows)."""
    sums = torch.zeros(2, num_rows, dtype=torch.float64, device=tokens.losses.device)
    sums[0].index_add_(0, tokens.rows, tokens.losses.detach().double())
    sums[1] = torch.bincount(tokens.rows, minlength=num_rows)
    return sums.cpu().numpy()


def task_sums(tokens: TokenLosses, batch: Batch, num_tasks: int) -> TaskSums:
    """Per-task sums of detached token losses."""
    total = torch.zeros(num_tasks, dtype=torch.float64, device=tokens.losses.device)
    total.index_add_(0, tokens.task_ids, tokens.losses.detach().double())
    return TaskSums(total, batch.targets_per_task(num_tasks), batch.samples_per_task(num_tasks))


@dataclass(frozen=True)
class TokenWeights:
    """Weight of each target token in the loss of a global step."""

    task_T: torch.Tensor
    """Of one token of each task, float32; of one sample where `per_sample`."""
    per_sample: bool

    @classmethod
    def of(
        cls, normalise: Normalise, tokens_T: np.ndarray, samples_T: np.ndarray, device: torch.device
    ) -> TokenWeights:
        """The weights without u_i.

        Args:
            normalise: Which of the three.
            tokens_T: Target tokens N_i of the global step.
            samples_T: Samples n_i of the global step.
            device: Where the losses are.
        """
        present = tokens_T > 0
        weights = np.zeros(len(tokens_T))
        if normalise == "task_token_mean":
            weights[present] = samples_T[present] / (samples_T.sum() * tokens_T[present])
        else:
            total = tokens_T if normalise == "token_mean" else samples_T
            weights[present] = 1 / total.sum()
        task_T = torch.tensor(weights, dtype=torch.float32, device=device)
        return cls(task_T, normalise == "example_mean")

    def times(self, factors_T: np.ndarray) -> TokenWeights:
        """With each task's weights multiplied by its factor."""
        return replace(self, task_T=self.task_T * self.task_T.new_tensor(factors_T))

    def __call__(self, tokens: TokenLosses) -> torch.Tensor:
        """Shape (number of target tokens,)."""
        weights = self.task_T[tokens.task_ids]
        return weights / tokens.sample_targets if self.per_sample else weights
