"""What PEFT itself writes gives the same logits here; what we cannot hold exactly is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.foreign import imported_logits, logits
from support.tiny import write_tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moe_medical.adapters.folder import load_adapter, save_adapter
from moe_medical.adapters.model import attach_adapters, load_adapter_state
from moe_medical.errors import ConfigError, DataError
from moe_medical.interop.foreign.importing import import_adapter

BASIC = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "regex": {"target_modules": r".*layers\.1\.(self_attn\.[qv]_proj|mlp\.\w+_proj)"},
    "all_linear": {"target_modules": "all-linear"},
    "some_layers": {"layers_to_transform": [1]},
    "without_some": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "rs_lora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6}},
    "alphas": {"alpha_pattern": {r"layers\.0\..*": 3.0}, "rank_pattern": {"q_proj": 3}},
    "ranks_rs_dora": {"rank_pattern": {"q_proj": 6}, "use_rslora": True, "use_dora": True},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"))


def write_peft(folder: Path, base: Path, **options: Any) -> torch.Tensor:
    """A trained-looking adapter saved by PEFT; returns its model's logits."""
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**{**BASIC, **options}))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if options.get("use_dora"):
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    return logits(model)


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("form", FORMS)
def test_peft_and_we_say_the_same(base: Path, tmp_path: Path, form: str) -> None:
    expected = write_peft(tmp_path / "peft", base, **FORMS[form])
    report = import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, logits(LlamaForCausalLM.from_pretrained(base)), atol=1e-2)
    assert (report.kind, report.config.preset, report.config.dropout) == ("peft", "lora", 0.1)


def test_equal_ranks_are_kept_bit_for_bit(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", base)
    import_adapter(tmp_path / "peft", tmp_path / "ours", "peft", str(base))
    theirs, (config, meta, ours) = (
        load_file(tmp_path / "peft" / "adapter_model.safetensors"),
        load_adapter(tmp_path / "ours"),
    )
    assert len(ours) == len(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[f"base_model.model.{name}.weight"])
    assert (config.rank, config.alpha) == (4, 8.0)
    assert (meta["base_model"], meta["tasks"], meta["label_sets"]) == (str(base), [], {})


def test_conv1d_layers_with_fan_in_fan_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "base"
    )
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    options = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    wrapped = get_peft_model(model, options)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "peft")
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(tmp_path / "base"))
    config, _, state = load_adapter(tmp_path / "ours")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    attach_adapters(ours, config, seed=0)
    load_adapter_state(ours, state)
    torch.testing.assert_close(logits(ours), logits(wrapped), atol=2e-5, rtol=1e-4)


def test_old_names_of_magnitudes_and_gathered_states(base: Path, tmp_path: Path) -> None:
    expected = write_peft(tmp_path / "peft", base, use_dora=True)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    state = {
        name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector").replace(
            "lora_A.weight", "lora_A.default.weight"
        ): tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(state, weights)
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)


def test_names_of_the_inner_model_are_found(base: Path, tmp_path: Path) -> None:
    """Adapters of a bare `LlamaModel` lack the outer `model.`."""
    expected = write_peft(tmp_path / "peft", base)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    state = {
        n.replace("base_model.model.model.", "base_model.model."): t for n, t in load_file(weights).items()
    }
    save_file(state, weights)
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)


def test_half_precision_becomes_float32(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", base)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(weights).items()}, weights)
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    expected = logits(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "peft"))
    torch.testing.assert_close(imported_logits(tmp_path / "ours", base), expected, atol=2e-5, rtol=1e-4)
    assert {tensor.dtype for tensor in load_adapter(tmp_path / "ours")[2].values()} == {torch.float32}


def test_every_tensor_that_is_wrong_is_named(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", base)
    weights = tmp_path / "peft" / "adapter_model.safetensors"
    state = load_file(weights)
    module = "base_model.model.model.layers.{}.self_attn.q_proj"
    del state[f"{module.format(0)}.lora_A.weight"]
    state[f"{module.format(1)}.lora_B.weight"] = torch.zeros(32, 5)
    state["base_model.model.model.embed_tokens.weight"] = torch.zeros(3)
    state["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"][0, 0] = torch.nan
    save_file(state, weights)
    with pytest.raises(ConfigError) as caught:
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    told = {
        problem.path.removeprefix("base_model.model.model."): problem.rule
        for problem in caught.value.problems
    }
    assert told == {
        "layers.0.self_attn.q_proj.lora_A.weight": "is missing",
        "layers.1.self_attn.q_proj.lora_B.weight": "must have shape (32, 4)",
        "embed_tokens.weight": "is not expected",
        "layers.0.mlp.down_proj.lora_B.weight": "must be finite",
    }
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("modules_to_save", ["embed_tokens"]),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa"),
        ("lora_bias", True),
        ("enable_lora", [True, False, True]),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["mlp.experts.down_proj"]),
        ("trainable_token_indices", [1]),
        ("some_later_option", {"a": 1}),
        ("peft_type", "LOHA"),
        ("r", 0),
        ("lora_alpha", "8"),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", [1]),
        ("lora_dropout", 3),
        ("target_modules", [1]),
        ("layers_to_transform", "all"),
    ],
)
def test_a_setting_that_we_cannot_hold_is_named(
    base: Path, tmp_path: Path, setting: str, value: object
) -> None:
    write_peft(tmp_path / "peft", base)
    edit(tmp_path / "peft", **{setting: value})
    with pytest.raises(ConfigError) as caught:
        import_adapter(tmp_path / "peft", tmp_path / "ours", "peft", str(base))
    assert len(caught.value.problems) == 1
    assert any(word in str(caught.value) for word in (setting, *(value if isinstance(value, dict) else ())))
    assert not (tmp_path / "ours").exists()


def test_a_module_beside_the_targets_is_named(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", base)
    edit(tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"down_proj is not among target_modules"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))


@pytest.mark.parametrize("change", [{"target_modules": ["x"]}, {"layers_to_transform": 5}], ids=str)
def test_targets_that_are_nowhere_are_told(base: Path, tmp_path: Path, change: dict[str, object]) -> None:
    write_peft(tmp_path / "peft", base)
    edit(tmp_path / "peft", **change)
    with pytest.raises(ConfigError, match="4 problems") as caught:
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    assert "is not among target_modules" in str(caught.value)


@pytest.mark.parametrize("other", [{"hidden_size": 48}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_base_is_one_line(base: Path, tmp_path: Path, other: dict[str, int]) -> None:
    write_peft(tmp_path / "peft", base)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} | other
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="must be an adapter of") as caught:
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(tmp_path / "other"))
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "ours").exists()


def test_another_programs_adapter_is_never_replaced(base: Path, tmp_path: Path) -> None:
    """Its files may have the names of ours."""
    write_peft(tmp_path / "peft", base)
    (tmp_path / "peft" / "README.md").unlink()
    shutil.copytree(tmp_path / "peft", tmp_path / "second")
    for out in ("peft", "second"):
        with pytest.raises(ConfigError, match="another program's adapter"):
            import_adapter(tmp_path / "peft", tmp_path / out, "auto", str(base))
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    with pytest.raises(ConfigError, match="ours already"):
        import_adapter(tmp_path / "ours", tmp_path / "third", "auto", str(base))


def test_what_is_no_adapter_folder_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder with adapter_config\.json"):
        import_adapter(tmp_path / "nothing", tmp_path / "ours", "auto", str(base))
    write_peft(tmp_path / "peft", base)
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"no such file")
    with pytest.raises(DataError, match="is not a readable safetensors file"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="must hold adapter_model"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    (tmp_path / "peft" / "adapter_config.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object"):
        import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))


def test_a_saved_adapter_can_be_saved_over(base: Path, tmp_path: Path) -> None:
    write_peft(tmp_path / "peft", base)
    import_adapter(tmp_path / "peft", tmp_path / "ours", "auto", str(base))
    config, meta, state = load_adapter(tmp_path / "ours")
    save_adapter(tmp_path / "ours", state, config, meta)
    assert meta["imported_from"]["kind"] == "peft"
