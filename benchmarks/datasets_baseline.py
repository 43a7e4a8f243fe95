"""The mixture with Hugging Face `datasets`, as its users would write it: what data_pipeline.py compares with.

    load_dataset("json") per task -> shuffle -> interleave_datasets(probabilities) -> DataLoader, 8 samples a
    batch, padded on the left to the longest

Two forms: tokenised by `.map(batched=True)` ahead of the loop, or in the collate function. Each batch has
ids, mask and labels on the targets alone. The chat template is rendered once, not for each sample, and the
calls of the tokenizer are batched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

Tensors = dict[str, torch.Tensor]
_COLUMNS = ["instruction", "input", "output"]
_IGNORE = -100
BATCH = 8
"""Samples."""


class Tokenise:
    """Columns of records -> columns of tokens."""

    def __init__(self, base: Path, system_prompt: str, max_length: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self.pad_id = self._tokenizer.pad_token_id
        self._max_length = max_length
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": "MARKER"}]
        rendered = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        self._head, self._middle = rendered.split("MARKER")

    def __call__(self, columns: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        asked = zip(columns["instruction"], columns["input"], strict=True)
        prompts = [self._head + f"{what}\n{text}".strip() + self._middle for what, text in asked]
        targets = [text.strip() + self._tokenizer.eos_token for text in columns["output"]]
        rows = [
            (prompt[-max(8, self._max_length - len(target)) :], target[: self._max_length - 8])
            for prompt, target in zip(self._ids(prompts), self._ids(targets), strict=True)
        ]
        return {"input_ids": [p + t for p, t in rows], "num_prompt_tokens": [len(p) for p, _ in rows]}

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


class Baseline:
    """Both forms of the mixture, and the seconds that it took to make them ready.

    Args:
        files: The JSONL of each task.
        shares: Of each task, summing to 1.
        tokenise: Records to tokens.
        seed: Of the order.
        cache: An empty folder.
    """

    def __init__(
        self, files: Sequence[Path], shares: Sequence[float], tokenise: Tokenise, seed: int, cache: Path
    ) -> None:
        datasets.disable_progress_bars()
        self._tokenise = tokenise
        self.seconds: dict[str, dict[str, float]] = {}
        """Stage -> wall and CPU seconds."""
        with timed(self.seconds, "load"):
            texts = [self._load(file, cache) for file in files]
        with timed(self.seconds, "map"):
            tokens = [
                text.map(tokenise, batched=True, remove_columns=text.column_names, desc="") for text in texts
            ]
        self.num_tokens = sum(len(ids) for part in tokens for ids in part.with_format("numpy")["input_ids"])
        """Of all rows of all tasks."""
        with timed(self.seconds, "interleave"):
            self._tokens = self._mixed(tokens, shares, seed)
        self._texts = self._mixed(texts, shares, seed)

    def mapped(self, samples: range) -> Iterator[Tensors]:
        """The batches of some samples of the mixture, tokenised ahead."""
        return iter(self._loader(self._tokens.with_format("numpy"), self._padded, samples))

    def on_the_fly(self, samples: range) -> Iterator[Tensors]:
        """The same, tokenised as they are collated."""
        return iter(self._loader(self._texts, self._tokenised, samples))

    def lengths(self, samples: range) -> list[int]:
        """Tokens of some samples of the mixture."""
        return [len(ids) for ids in self._tokens[samples]["input_ids"]]

    def _load(self, file: Path, cache: Path) -> datasets.Dataset:
        loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
        return loaded.select_columns(_COLUMNS)

    def _mixed(
        self, parts: Sequence[datasets.Dataset], shares: Sequence[float], seed: int
    ) -> datasets.Dataset:
        shuffled = [part.shuffle(seed=seed + i) for i, part in enumerate(parts)]
        return datasets.interleave_datasets(
            shuffled, probabilities=list(shares), seed=seed, stopping_strategy="all_exhausted"
        )

    def _loader(self, rows: datasets.Dataset, collate: Any, samples: range) -> DataLoader:
        return DataLoader(rows, batch_size=BATCH, sampler=samples, collate_fn=collate, num_workers=0)

    def _tokenised(self, records: Sequence[Mapping[str, str]]) -> Tensors:
        columns = self._tokenise({name: [record[name] for record in records] for name in _COLUMNS})
        pairs = zip(columns["input_ids"], columns["num_prompt_tokens"], strict=True)
        return self._padded([{"input_ids": ids, "num_prompt_tokens": border} for ids, border in pairs])

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> Tensors:
        sizes = [len(sample["input_ids"]) for sample in samples]
        shape = (len(samples), max(sizes))
        ids = torch.full(shape, self._tokenise.pad_id)
        labels, mask = torch.full(shape, _IGNORE), torch.zeros(shape, dtype=torch.bool)
        for b, (sample, size) in enumerate(zip(samples, sizes, strict=True)):
            start = shape[1] - size
            border = start + int(sample["num_prompt_tokens"])
            ids[b, start:] = torch.as_tensor(sample["input_ids"])
            mask[b, start:] = True
            labels[b, border:] = ids[b, border:]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def timed(seconds: dict[str, dict[str, float]], stage: str) -> Iterator[None]:
    """Notes the wall and CPU seconds of what is done under it."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    seconds[stage] = {name: round(value, 2) for name, value in spent.items()}
