"""ZeRO-3 reads the base in parts: the model and its training are those of the whole base, and no rank ever
holds the whole one, which is shown under a limit on each rank's memory that is smaller than the base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from support.launches import checkpoint_steps, rows
from support.ranks import on_ranks
from support.tiny import write_tiny_model, write_tiny_run

if TYPE_CHECKING:
    from torch import nn

    from moe_medical.base_model import BaseModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 18,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Few sizes that four ranks could share evenly; Qwen2's key biases have 6 elements, which leaves one none."""
ZERO3 = {"stage": 3, "contiguous_gradients": True, "reduce_scatter": True, "overlap_comm": False}
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""Give every parameter back as soon as it has been used; the defaults would keep so small a base gathered."""


# The model


def _write_families(folder: Path) -> list[str]:
    import transformers as t

    gpt2 = {
        "n_embd": 18,
        "n_head": 3,
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 61,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    models = {
        "tied": t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "untied": t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=False)),
        "qwen2": t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
        "qwen3": t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True)),
        "gemma2": t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=6)),
        "gpt2": t.GPT2Model(t.GPT2Config(**gpt2)),  # as the hub has it: names without `transformer.`
    }
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="10KB" if name == "untied" else "1GB")
    return list(models)


def _differences(folder: str, names: list[str], dtype: str) -> dict[str, list[str]]:
    """By family: what is not as in the whole model."""
    from moe_medical.base_model import BaseModel
    from moe_medical.config.schema import ParallelSection
    from moe_medical.distributed.topology import start_distributed

    topology = start_distributed(ParallelSection(device="cpu"))
    found = {}
    for name in names:
        path = Path(folder) / name
        base = BaseModel(name, None, path, json.loads((path / "config.json").read_text()))
        found[name] = _compare(base, dtype, topology.world_size)
    return found


def _differences_alone(*arguments: Any) -> dict[str, list[str]]:
    from moe_medical.distributed.topology import stop_distributed

    found = _differences(*arguments)
    stop_distributed()
    return found


def _compare(base: BaseModel, dtype: str, world: int) -> list[str]:
    import deepspeed
    import torch

    from moe_medical.base_model.load import load_base
    from moe_medical.distributed.sharded_base import load_sharded_base

    settings = {"zero_optimization": ZERO3 | STRICT, "train_micro_batch_size_per_gpu": 1}
    whole, sharded = load_base(base, dtype), load_sharded_base(base, dtype, settings)
    wrong = [name for name, same in _same_structure(whole, sharded).items() if not same]
    for (name, p), (_, q) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        if q.numel() or cast(Any, q).ds_tensor.numel() != math.ceil(p.numel() / world) or q.requires_grad:
            wrong.append(f"{name} is not in parts")
        with deepspeed.zero.GatheredParameters([q]):
            if q.dtype != p.dtype or not torch.equal(q, p):
                wrong.append(name)
    engine, *_ = deepspeed.initialize(model=sharded, config=settings)
    tokens = torch.arange(3, 18).view(1, -1)
    with torch.no_grad():
        if not torch.equal(engine(input_ids=tokens).logits, whole(input_ids=tokens).logits):
            wrong.append("logits")
    return wrong


def _same_structure(whole: Any, sharded: Any) -> dict[str, bool]:
    import torch

    def head_is_tied(model: Any) -> bool:
        return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)

    def names(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters(remove_duplicate=False)]

    def config(model: Any) -> dict[str, Any]:
        return model.config.to_dict() | {
            "_name_or_path": None,
            "attention": model.config._attn_implementation,
        }

    ours, theirs = dict(sharded.named_buffers()), dict(whole.named_buffers())
    return {
        "class": type(sharded) is type(whole),
        "training": sharded.training is whole.training,
        "config": config(sharded) == config(whole),
        "generation": sharded.generation_config.to_dict() == whole.generation_config.to_dict(),
        "tied head": head_is_tied(sharded) is head_is_tied(whole),
        "names": names(sharded) == names(whole),
        "buffer types": {n: b.dtype for n, b in ours.items()} == {n: b.dtype for n, b in theirs.items()},
        "buffers": all(torch.equal(ours[name], buffer) for name, buffer in theirs.items()),
    }


def test_the_model_is_the_whole_one_on_one_rank(tmp_path: Path) -> None:
    names = _write_families(tmp_path)
    differences = on_ranks(1, _differences_alone, tmp_path, str(tmp_path), names, "bfloat16")
    assert differences == [{name: [] for name in names}]


# Memory


def _model_then_memory(folder: str, names: list[str], spare: int) -> dict[str, Any]:
    """`_differences`, and how whole and sharded base fare with `spare` bytes beyond what a rank has now."""
    import gc
    import resource

    from moe_medical.base_model import locate_base
    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.errors import DataError
    from moe_medical.training.trainer import Trainer

    differences = _differences(folder, names, "float32")
    warm = load_config(f"{folder}/run.yaml", [f"run.dir={folder}/warm"])
    topology = start_distributed(warm.parallel)
    Trainer(warm, topology).run()  # imports what a run imports
    gc.collect()
    large = load_config(f"{folder}/run.yaml", [f"run.dir={folder}/large", f"model.name={folder}/large_base"])
    resource.setrlimit(resource.RLIMIT_DATA, (_private_bytes() + spare, resource.RLIM_INFINITY))
    try:
        load_base(locate_base(large.model), "float32")
        whole = "fits"
    except DataError as e:
        whole = str(e)
    gc.collect()
    Trainer(large, topology).run()
    stop_distributed()
    return {"differences": differences, "whole": whole}


def _private_bytes() -> int:
    """What RLIMIT_DATA counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))


def _write_large_base(folder: Path) -> int:
    """54M parameters in bfloat16; returns their bytes in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_model(folder)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64}
    config = json.loads((folder / "config.json").read_text()) | sizes | {"num_hidden_layers": 5}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).bfloat16()
    model.save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.parameters())


def _write_settings(path: Path, zero: dict[str, Any]) -> str:
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def test_no_rank_holds_the_whole_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _write_families(tmp_path)
    base_bytes = _write_large_base(tmp_path / "large_base")
    buckets = {"reduce_bucket_size": 1_000_000, "sub_group_size": 1_000_000}
    settings = _write_settings(tmp_path / "strict.json", ZERO3 | STRICT | buckets)
    write_tiny_run(
        tmp_path,
        training={"steps": 1, "global_batch": 4, "micro_batch": 1},
        parallel={"ranks": 4, "deepspeed": settings},
        evaluation={"loss_rows": 2, "score_rows": 0, "batch_rows": 1},
    )
    # Otherwise glibc keeps freed buffers of some megabytes for itself, and they count.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread for each core has a stack of 8 MB
    results = on_ranks(
        4, _model_then_memory, tmp_path, str(tmp_path), names, int(0.75 * base_bytes), timeout=280, fresh=True
    )
    assert [r["differences"] for r in results] == [{name: [] for name in names}] * 4
    assert all("memory" in r["whole"] for r in results), results
    losses = [row["eval/macro_loss"] for row in rows(tmp_path / "large") if "eval/macro_loss" in row]
    assert len(losses) == 2
    assert losses[1] < losses[0]


# Training


def _train_each_way(folder: str, cases: dict[str, list[str]]) -> str:
    """Run each case to its end in a folder of its own, then a resumption; returns F.linear's name."""
    import shutil

    import torch

    from moe_medical.base_model.load import load_base
    from moe_medical.config import load_config
    from moe_medical.distributed.topology import start_distributed, stop_distributed
    from moe_medical.training import setup as assembly
    from moe_medical.training.trainer import Trainer

    sharded = assembly.load_base_for_engine
    for name, overrides in cases.items():
        config = load_config(f"{folder}/run.yaml", [f"run.dir={folder}/{name}", *overrides])
        topology = start_distributed(config.parallel)
        if name == "resumed" and topology.is_main:
            shutil.copytree(f"{folder}/zero2", f"{folder}/resumed")
            shutil.rmtree(max(Path(folder, "resumed", "checkpoints").glob("step-*")))
        topology.barrier()
        whole = "whole" in name
        assembly.load_base_for_engine = (lambda b, c, _: load_base(b, c.model.dtype)) if whole else sharded
        Trainer(config, topology).run()
    stop_distributed()
    return torch.nn.functional.linear.__name__


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Rows of metrics.jsonl of each case; they hold losses, gradient norms and evaluations."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny_run(
        folder,
        training={"steps": 3, "global_batch": 8, "micro_batch": 2, "learning_rate": 0.01},
        evaluation={"loss_rows": 4, "score_rows": 2, "max_new_tokens": 3, "batch_rows": 4},
        checkpoint={"every_steps": 1},
        tracking={"wandb": {"enabled": False}, "conflict_every_steps": 0},  # ZeRO-3 has no such looks
    )
    offload = {"offload_param": {"device": "cpu", "pin_memory": False}}
    jsons = {"zero2": ZERO3 | {"stage": 2}, "zero3": ZERO3, "offloaded": ZERO3 | STRICT | offload}
    zero2, zero3, offloaded = (
        f"parallel.deepspeed={_write_settings(folder / f'{name}.json', zero)}" for name, zero in jsons.items()
    )
    half = "model.dtype=bfloat16"
    cases = {
        "zero2": [zero2],
        "whole": [zero3],
        "sharded": [zero3],
        "resumed": [zero3, "checkpoint.resume=must"],
        "whole_bfloat16": [zero3, half],
        "offloaded_bfloat16": [offloaded, half],
    }
    linears = on_ranks(2, _train_each_way, folder, str(folder), cases)
    assert linears == ["zero3_linear_wrap"] * 2  # an ordinary one keeps each gathered weight for backward
    assert {name: checkpoint_steps(folder / name) for name in cases} == {name: [2, 3] for name in cases}
    return {name: rows(folder / name) for name in cases}


def test_training_is_that_of_the_whole_base(trained: dict[str, list[dict[str, Any]]]) -> None:
    assert trained["sharded"] == trained["whole"]
    assert trained["offloaded_bfloat16"] == trained["whole_bfloat16"]
    assert trained["offloaded_bfloat16"] != trained["sharded"]


def test_training_is_that_of_another_stage(trained: dict[str, list[dict[str, Any]]]) -> None:
    assert trained["sharded"] == [pytest.approx(row, rel=1e-5) for row in trained["zero2"]]
    assert {"loss", "grad_norm"} < trained["sharded"][1].keys()


def test_a_run_of_another_stage_goes_on(trained: dict[str, list[dict[str, Any]]]) -> None:
    assert trained["resumed"] == [pytest.approx(row, rel=1e-5) for row in trained["zero2"]]
