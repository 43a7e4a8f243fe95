"""Models that keep packed samples apart pass the check; those that cannot are told apart by their numbers."""

from __future__ import annotations

import pytest
import torch
from support.families import DECODER, GPT2
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_medical.evaluation.packing_check import why_not_packed

CPU = torch.device("cpu")
BLOOM = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}


def tiny(family: str, settings: dict, attention: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", None])
@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text"]
)
def test_decoders_with_rotary_positions_pack(family: str, attention: str | None) -> None:
    assert why_not_packed(tiny(family, DECODER, attention), CPU) is None


def test_learned_positions_pack() -> None:
    assert why_not_packed(tiny("gpt2", GPT2), CPU) is None


def test_bfloat16_packs() -> None:
    assert why_not_packed(tiny("llama", DECODER).bfloat16(), CPU) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "settings"), [("bloom", BLOOM), ("mamba", MAMBA)])
def test_models_without_positions_do_not(family: str, settings: dict, dtype: torch.dtype) -> None:
    assert "see each other" in str(why_not_packed(tiny(family, settings).to(dtype), CPU))


def test_positions_that_run_on_are_found_out() -> None:
    """Samples are kept apart, but each is told positions that go on from the one before."""
    model = tiny("gpt2", GPT2).eval()
    forward = model.forward

    class RunsOn(nn.Module):
        def forward(self, position_ids: torch.Tensor, **inputs: torch.Tensor) -> object:
            starts = (position_ids == 0).cumsum(1) - 1
            return forward(position_ids=position_ids + starts, **inputs)

        get_input_embeddings = model.get_input_embeddings

        def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
            return model.parameters(recurse)

    assert "not as they are alone" in str(why_not_packed(RunsOn(), CPU))


def test_a_mask_that_ignores_positions_is_found_out() -> None:
    """Full causal attention over the row, as a model would have that does not know packing."""
    model = tiny("llama", DECODER)
    forward = model.forward

    class Leaky(nn.Module):
        def forward(self, attention_mask: torch.Tensor | None = None, **inputs: torch.Tensor) -> object:
            return forward(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs)

        def get_input_embeddings(self) -> nn.Module:
            return model.get_input_embeddings()

        def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
            return model.parameters(recurse)

    assert "see each other" in str(why_not_packed(Leaky(), CPU))


def test_dropout_is_left_as_it_was() -> None:
    model = tiny("llama", DECODER | {"attention_dropout": 0.5}).train()
    assert why_not_packed(model, CPU) is None
    assert model.training
