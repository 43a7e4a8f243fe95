"""A tiny real model folder, tasks and run file: the whole path in seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [f"w{i}" for i in range(40)]


def write_tiny_model(folder: Path, seed: int = 0, tied: bool = True) -> Path:
    """A Llama of hidden 32 and 2 layers with a trained BPE tokenizer and a ChatML template.

    `tied`: whether the output head is the embedding table.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    corpus = [" ".join(WORDS), "system user assistant", "Repeat the last word. Is it even? yes no"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=2,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_tiny_tasks(folder: Path) -> Path:
    """Tasks `last_word` (80 training rows) and `even` (20) and their mixture, whose path is returned."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, sizes in (("last_word", (80, 12, 12)), ("even", (20, 8, 8))):
        for split, size in zip(("train", "validation", "test"), sizes, strict=True):
            rows = [_row(name, f"{split}-{i}", rng) for i in range(size)]
            (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(_spec(name)))
    mixture = folder / "mixture.yaml"
    mixture.write_text(yaml.safe_dump({"name": "tiny", "tasks": ["last_word.yaml", "even.yaml"]}))
    return mixture


def _row(task: str, id: str, rng: random.Random) -> dict[str, str]:
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 6))]
    even = "yes" if int(words[-1][1:]) % 2 == 0 else "no"
    return {"id": id, "input": " ".join(words), "output": words[-1] if task == "last_word" else even}


def _spec(name: str) -> dict[str, object]:
    last_word = name == "last_word"
    return {
        "name": name,
        "kind": "generation" if last_word else "yes_no",
        "metric": "exact_match" if last_word else "accuracy",
        "language": "en",
        "source": {"files": {s: f"{name}.{s}.jsonl" for s in ("train", "validation", "test")}},
        "prompt": ("Repeat the last word.\n" if last_word else "Is it even?\n") + "{input}",
        "target": "{output}",
        "licence": "CC0-1.0",
        "citation": "made for the tests",
        "tags": [],
        "phi": False,
    }


def write_tiny_run(folder: Path, **sections: dict[str, object]) -> Path:
    """Model, tasks and a run file of 6 steps on 2 CPU ranks; `sections` are merged over it."""
    run = {
        "run": {"name": "tiny", "dir": str(folder / "run")},
        "model": {"name": str(write_tiny_model(folder / "model"))},
        "adapters": {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8},
        "data": {
            "recipe": str(write_tiny_tasks(folder / "tasks")),
            "max_length": 96,
            "system_prompt": None,
            "mix": {"block": 16, "max_repeats": None},
        },
        "training": {"steps": 6, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01},
        "parallel": {"ranks": 2, "deepspeed": str(ROOT / "ds_configs" / "zero2.json"), "device": "cpu"},
        "evaluation": {"loss_rows": 8, "score_rows": 4, "max_new_tokens": 6, "batch_rows": 4},
        "checkpoint": {"every_steps": 2},
        "tracking": {"wandb": {"enabled": False}},
    }
    for section, values in sections.items():
        run[section] = {**run[section], **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path
