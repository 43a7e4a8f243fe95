"""A folder with its own loader says what the adapted model says, where nothing of ours is installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.exporting import IDS, TASK, TOKEN, adapted_model, write_adapter
from support.tiny import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_medical.adapters.routing import BatchInputs
from moe_medical.config.adapters import PRESETS
from moe_medical.interop.hf_folder import export_hf_folder, runtime_sources


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


ALONE = """
import sys, torch
sys.modules["moe_medical"] = None  # not installed
sys.modules["peft"] = sys.modules["omegaconf"] = sys.modules["deepspeed"] = None
sys.path.insert(0, sys.argv[1])
from load_moe_medical import load
ids = torch.load(sys.argv[2], weights_only=True)
for folder in sys.argv[4:]:
    loaded = load(folder)
    tasks = {"task": ["codes", "report"]}.get(folder.rsplit("/", 1)[-1])
    mask = torch.ones_like(ids, dtype=torch.bool) if folder.endswith("sequence") else None
    with loaded.rows(tasks, mask), torch.no_grad():
        logits = loaded.model(ids).logits
    cached = not folder.endswith("xlora")
    settings = dict(max_new_tokens=4, do_sample=False, use_cache=cached, pad_token_id=0, eos_token_id=None)
    with loaded.rows(tasks, mask):
        new = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    torch.save((logits, new), f"{sys.argv[3]}/{folder.rsplit('/', 1)[-1]}.pt")
assert loaded.tokenizer("w1 w2").input_ids
"""
WHOLE = {
    "token": replace(TOKEN, top_k=2, path="concat"),
    "layer": replace(TOKEN, top_k=2, router_scope="layer", molora=(r".*\.(gate|up)_proj",), lora=()),
    "task": replace(TASK, shared_a=True),
    "sequence": replace(TOKEN, router="sequence", top_k=2),
    "xlora": replace(PRESETS["xlora"], num_experts=4, rank=4),
    "mixlora": replace(PRESETS["mixlora"], num_experts=4, rank=4),
    "med_moe": replace(PRESETS["med_moe"], num_experts=2),
}


def test_a_folder_runs_where_nothing_of_ours_is_installed(base: Path, tmp_path: Path) -> None:
    for name, config in WHOLE.items():
        adapter = write_adapter(tmp_path / "adapters" / name, base, config)
        export_hf_folder(adapter, tmp_path / name, link=name == "layer")
    torch.save(IDS, tmp_path / "ids.pt")
    (tmp_path / "said").mkdir()
    folders = [str(tmp_path / name) for name in WHOLE]
    arguments = [folders[0], str(tmp_path / "ids.pt"), str(tmp_path / "said"), *folders]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in WHOLE:
        logits, new = torch.load(tmp_path / "said" / f"{name}.pt", weights_only=True)
        model, context = adapted_model(base, tmp_path / "adapters" / name)
        tasks = torch.tensor([1, 2]) if name == "task" else None
        mask = torch.ones_like(IDS, dtype=torch.bool) if name == "sequence" else None
        text = IDS
        with torch.no_grad():
            with context.bind(BatchInputs.of_rows(tasks, mask)):
                torch.testing.assert_close(logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
            for _ in range(4):  # without a cache, which the folder's model has
                with context.bind(
                    BatchInputs.of_rows(tasks, None if mask is None else text_mask(mask, text))
                ):
                    text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(text, new), name


def text_mask(prompt_mask: Tensor, text: Tensor) -> Tensor:
    """The prompt's mask, False on what was generated after it."""
    return torch.nn.functional.pad(prompt_mask, (0, text.shape[1] - prompt_mask.shape[1]))


def test_transformers_alone_does_not_take_the_base_for_the_model(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, TOKEN)
    export_hf_folder(adapter, tmp_path / "folder")
    with pytest.raises(ValueError, match="moe_medical"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert AutoTokenizer.from_pretrained(tmp_path / "folder")("w1").input_ids
    weights = (tmp_path / "folder" / "model.safetensors").stat()
    assert weights.st_ino != (base / "model.safetensors").stat().st_ino
    export_hf_folder(adapter, tmp_path / "linked", link=True)
    weights = (tmp_path / "linked" / "model.safetensors").stat()
    assert weights.st_ino == (base / "model.safetensors").stat().st_ino


def test_the_code_in_the_folder_is_all_ours_under_another_name() -> None:
    sources = runtime_sources()
    assert "load_moe_medical.py" in sources
    assert "moe_medical_runtime/adapters/layer.py" in sources
    for text in sources.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "moe_medical"
