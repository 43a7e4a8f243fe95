"""A base model that a CPU adapts in a minute, for benchmarks that compare many runs of real tasks.

It is a small Llama with a byte-level tokenizer, both trained on the training prompts of
`data_recipes/public_text.yaml` and on no target, so that adapters have everything to learn of the answers.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_medical.base_model import locate_base
from moe_medical.config.schema import RunConfig
from moe_medical.data.recipe import load_mixture
from moe_medical.data.sources import load_split
from moe_medical.data.tasks import cache_tokens
from moe_medical.training.data_module import DataModule

LOG = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "data_recipes" / "public_text.yaml"
END_ID = 1
"""Of <|im_end|>."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class BaseSize:
    """How large the base is, and how long it is trained."""

    pretraining_steps: int = 300
    layers: int = 4
    hidden: int = 192
    vocabulary: int = 8192

    @property
    def title(self) -> str:
        return f"Llama of {self.layers} layers and hidden {self.hidden}, trained on the prompts alone"


def write_base(folder: Path, size: BaseSize) -> Path:
    """Train tokenizer and model on training prompts; the folder is written at the end, and returned."""
    specs = load_mixture(RECIPE).tasks
    texts = [e.prompt for spec in specs for e in load_split(spec, "train", 0.01).examples]
    random.Random(0).shuffle(texts)
    tokenizer = _train_tokenizer(texts, size.vocabulary)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=END_ID,
            pad_token_id=END_ID,
        )
    )
    _pretrain(model, tokenizer, texts, size.pretraining_steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts[:30_000], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast


def _pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int
) -> None:
    """Next-token prediction, every parameter, one-cycle learning rate; logs the loss."""
    width, rows = 256, 8
    stream = [i for text in texts for i in [*tokenizer.encode(text), END_ID]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        first = step * width * rows % (len(stream) - width * rows)
        ids = torch.tensor(stream[first : first + width * rows]).view(rows, width)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            LOG.info("pretraining step %d of %d: loss %.3f", step, steps, float(loss.detach()))


def mix_overrides(mix: dict[str, Any], prefix: str = "data.mix") -> list[str]:
    """The keys of a mix section as `key=value`."""
    overrides: list[str] = []
    for key, value in mix.items():
        if isinstance(value, dict):
            overrides += mix_overrides(value, f"{prefix}.{key}")
        else:
            overrides.append(f"{prefix}.{key}={'null' if value is None else value}")
    return overrides


def tokens_per_step(config: RunConfig) -> float:
    """Mean tokens of a step under the run's static shares."""
    data = DataModule(config, locate_base(config.model))
    samples = data.samples(config.training.steps)
    tasks = cache_tokens(data.tasks, samples.tolist(), "always", ranks=1)
    tokens = sum(n * task.tokens.mean_length for n, task in zip(samples.tolist(), tasks, strict=True))
    return float(config.training.global_batch * tokens / samples.sum())
