"""A merged model says what the adapted one says, and what cannot be merged leaves nothing behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.exporting import (
    ATTENTION,
    LORA,
    TASK,
    TASKS,
    TOKEN,
    adapted_logits,
    plain_logits,
    write_adapter,
    write_base,
)
from support.tiny import write_tiny_model
from transformers import AutoTokenizer

from moe_medical.config.adapters import PRESETS, MoloraConfig
from moe_medical.errors import ConfigError, DataError
from moe_medical.interop import merge
from moe_medical.interop.effective import LowRank
from moe_medical.interop.merge import merge_adapter, merge_matrix
from moe_medical.interop.opened import open_adapter
from moe_medical.interop.verify import probe_logits, refuse_other_logits

SPLIT = replace(TASK, rank_split=True, rank=8)
FORMS = {
    "lora": LORA,
    "dora": replace(LORA, dora=True),
    "rs_lora": replace(LORA, rs_lora=True),
    "task": TASK,
    "task_top_2": replace(TASK, top_k=2),
    "task_top_2_of_all": replace(TASK, top_k=2, renormalise=False, temperature=0.5),
    "moelora": replace(PRESETS["moelora"], num_tasks=3, rank=8),
    "layer_scope": replace(TASK, router_scope="layer"),
    "experts_per_layer": replace(TASK, experts_per_layer=(2, 4)),
    "shared_a": replace(TASK, shared_a=True),
    "shared_experts": replace(TASK, shared_experts=2, shared_weight=0.7),
    "learned_shared_weight": replace(SPLIT, shared_experts=1, learn_shared_weight=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("form", FORMS)
def test_merged_says_what_adapted_says(form: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, FORMS[form])
    task = "codes" if FORMS[form].router == "task" else None
    merge_adapter(adapter, tmp_path / "merged", [task] if task else None)
    expected = adapted_logits(base, adapter, task)
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert (plain_logits(base) - expected).abs().max() > 0.1


def test_one_folder_for_each_task_with_all_of_the_base(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, TASK)
    folders = merge_adapter(adapter, tmp_path / "out", TASKS)
    assert folders == [tmp_path / "out" / task for task in TASKS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]
    names = {path.name for path in base.iterdir()}
    for task, folder in zip(TASKS, folders, strict=True):
        assert {path.name for path in folder.iterdir()} == names | {merge.RECORD_FILE}
        expected = adapted_logits(base, adapter, task)
        torch.testing.assert_close(plain_logits(folder), expected, rtol=1e-4, atol=1e-4)
        assert task == "triage" or (plain_logits(folders[0]) - expected).abs().max() > 0.01
        assert json.loads((folder / merge.RECORD_FILE).read_text())["task"] == task
    assert AutoTokenizer.from_pretrained(folder)("w1 w2").input_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sharded_base_keeps_its_dtype_shards_and_index(dtype: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", dtype=dtype, shard="12KB")
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    merge_adapter(adapter, tmp_path / "merged")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    state = load_file(adapter / "adapter_model.safetensors")
    seen = 0
    for shard in shards:
        with safe_open(base / shard, "pt") as old, safe_open(tmp_path / "merged" / shard, "pt") as new:
            assert old.keys() == new.keys()
            for name in old.keys():  # noqa: SIM118
                before, module = old.get_tensor(name), name.removesuffix(".weight")
                if f"{module}.lora_A" in state:
                    delta = state[f"{module}.lora_B"].double() @ state[f"{module}.lora_A"].double()
                    exact = before.double() + 2 * delta
                    step = torch.finfo(before.dtype).eps * exact.abs()
                    assert ((new.get_tensor(name).double() - exact).abs() <= 0.51 * step + 1e-6).all()
                    seen += 1
                else:
                    assert torch.equal(new.get_tensor(name), before)
    assert seen == 14


@pytest.mark.parametrize("config", [LORA, replace(LORA, dora=True), TASK], ids=["lora", "dora", "task"])
def test_gpt2_stores_its_weights_the_other_way_round(config: MoloraConfig, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gpt2")
    adapter = write_adapter(tmp_path / "adapter", base, config, size=0.1)
    task = "triage" if config is TASK else None
    merge_adapter(adapter, tmp_path / "merged", [task] if task else None)
    expected = adapted_logits(base, adapter, task)
    torch.testing.assert_close(plain_logits(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


def test_the_sum_is_rounded_once() -> None:
    lora = LowRank(torch.full((2, 1), 2.0**-6), torch.full((1, 2), 2.0**-3), 1.0)
    once = merge_matrix(torch.ones(1, 1, dtype=torch.bfloat16), lora)
    assert once.item() == 1.0  # 1 + 2**-8, a tie, which goes to even; each half alone would vanish too
    assert merge_matrix(torch.tensor([[1.0078125]], dtype=torch.bfloat16), lora).item() == 1.015625


def test_the_parts_without_a_router_can_be_merged(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, replace(TOKEN, top_k=2))
    merge_adapter(adapter, tmp_path / "merged", only=["attention"])
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == 8
    assert all(".self_attn." in name for name in changed)


@pytest.mark.parametrize(
    ("config", "tasks", "rule"),
    [
        (TOKEN, None, r"6 modules whose experts are chosen by token .*mlp.*, \.\.\..*export hf"),
        (replace(TOKEN, router="joint", num_tasks=3), ["codes"], "chosen by token"),
        (replace(PRESETS["mixlora"], rank=4), None, "experts of whole blocks"),
        (TASK, None, "must be given.*triage, codes, report"),
        (TASK, ["billing"], "must be one of triage, codes, report.*billing"),
        (TASK, ["codes", "codes"], "each given once"),
        (LORA, ["codes"], "must not be given"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    config: MoloraConfig, tasks: list[str] | None, rule: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(ConfigError, match=rule):
        merge_adapter(adapter, tmp_path / "merged", tasks)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    other = write_base(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"does not fit .*other: 6 mismatches.*must have shape"):
        merge_adapter(adapter, tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_missing_or_extra_tensor_is_refused(change: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    if change == "missing":
        del state["model.layers.1.mlp.up_proj.lora_B"]
    else:
        state["model.layers.7.mlp.up_proj.lora_B"] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(ConfigError, match=r"1 mismatches.*up_proj\.lora_B is (missing|not in)"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_only_another_name_is_a_warning(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    (tmp_path / "same").symlink_to(base)
    merge_adapter(adapter, tmp_path / "merged", base=str(tmp_path / "same"), verify=False)
    assert "the adapter was trained on" in caplog.text


def test_a_folder_with_something_in_it_is_left_alone(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="must be empty"):
        merge_adapter(adapter, tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["thesis.tex"]


def test_a_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LORA)
    other = tmp_path / "other"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="must not be quantised"):
        merge_adapter(adapter, tmp_path / "merged", base=str(other))


def test_a_base_that_transformers_converts_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mixtral")
    adapter = write_adapter(tmp_path / "adapter", base, replace(LORA, lora=(ATTENTION,)))
    with pytest.raises(ConfigError, match="base cannot be merged: transformers converts its tensors"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_answers_otherwise_is_deleted(base: Path, tmp_path: Path) -> None:
    """An overflow in float16 is the plainest way to write another model than the adapted one."""
    half = write_base(tmp_path / "half", dtype="float16")
    adapter = write_adapter(tmp_path / "adapter", half, replace(LORA, alpha=4e6))
    with pytest.raises(DataError, match="logits differ"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "half"]


def test_another_task_does_not_pass_for_the_merged_one(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, TASK)
    merge_adapter(adapter, tmp_path / "merged", ["codes"], verify=False)
    opened = open_adapter(adapter)
    probe = probe_logits(opened, [TASKS.index("codes"), TASKS.index("report")])
    assert refuse_other_logits(opened, tmp_path / "merged", probe, 0) < 1e-4
    with pytest.raises(DataError, match="logits differ"):
        refuse_other_logits(opened, tmp_path / "merged", probe, 1)
    far = replace(probe, base=[logits + 1e3 for logits in probe.base])  # an adapter that changes much more
    with pytest.raises(DataError, match="logits differ"):
        refuse_other_logits(opened, tmp_path / "merged", far, 1)


def test_a_dtype_that_rounds_the_adapter_away_is_told(tmp_path: Path) -> None:
    coarse = write_base(tmp_path / "coarse", dtype="bfloat16")
    adapter = write_adapter(tmp_path / "adapter", coarse, replace(LORA, alpha=0.002), size=0.1)
    with pytest.raises(DataError, match="finer dtype"):
        merge_adapter(adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "coarse"]
