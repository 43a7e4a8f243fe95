"""Adapter folders in the layouts of other programs, and their forms as plain loops.

The layouts are written from what those programs' loaders read; the loops from their equations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from moe_medical.adapters.folder import load_adapter
from moe_medical.adapters.model import attach_adapters, load_adapter_state
from moe_medical.adapters.routing import BatchInputs

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PREFIX = "base_model.model."
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def linears(model: nn.Module, leaves: Sequence[str]) -> dict[str, nn.Linear]:
    """Full name -> linear layer with one of these own names."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: module for name, module in found.items() if name.rpartition(".")[2] in leaves}


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Large enough that every expert matters."""
    return torch.randn(shape, generator=generator) * 0.3


def write_json(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def write_pickle(path: Path, state: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), path)


def write_ming(
    folder: Path,
    model: nn.Module,
    experts: int = 4,
    shared: int = 0,
    attention: bool = True,
    rank: int = 4,
    prefix: str = PREFIX,
) -> dict[str, Tensor]:
    """The three artefacts of MING-MOE; returns experts and routers."""
    draw, state, loras = torch.Generator().manual_seed(1), {}, {}
    for name, linear in linears(model, FFN).items():
        out_features, in_features = linear.weight.shape
        state[f"{prefix}{name}.switch.weight"] = numbers(draw, experts, in_features)
        state[f"{prefix}{name}.switch.bias"] = numbers(draw, experts)
        for i in range(experts):
            state[f"{prefix}{name}.experts.{i}.lora_A_{i}.weight"] = numbers(draw, rank, in_features)
            state[f"{prefix}{name}.experts.{i}.lora_B_{i}.weight"] = numbers(draw, out_features, rank)
        if shared:
            state[f"{prefix}{name}.share_experts.lora_A.weight"] = numbers(draw, rank * shared, in_features)
            state[f"{prefix}{name}.share_experts.lora_B.weight"] = numbers(draw, out_features, rank * shared)
    for name, linear in linears(model, ATTENTION).items():
        out_features, in_features = linear.weight.shape
        loras[f"{PREFIX}{name}.lora_A.weight"] = numbers(draw, rank, in_features)
        loras[f"{PREFIX}{name}.lora_B.weight"] = numbers(draw, out_features, rank)
    model_config = {"num_experts": experts, "num_experts_per_token": 2, "expert_selection": "top_k"}
    model_config |= {"share_expert": bool(shared), "num_share_experts": max(shared, 1), "model_type": "qwen2"}
    write_json(folder / "config.json", model_config)
    write_json(folder / "adapter_config.json", peft_config(rank, 2 * rank, ATTENTION))
    write_pickle(folder / "non_lora_trainables.bin", state)
    if attention:
        write_pickle(folder / "adapter_model.bin", loras)
    return {**state, **(loras if attention else {})}


def peft_config(rank: int, alpha: float, targets: Sequence[str], **more: object) -> dict[str, object]:
    """What PEFT 0.4 to 0.9 wrote."""
    own = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets)}
    common = {"base_model_name_or_path": "some/base", "bias": "none", "fan_in_fan_out": False}
    common |= {"inference_mode": True, "init_lora_weights": True, "lora_dropout": 0.05}
    common |= {"modules_to_save": None, "task_type": "CAUSAL_LM", "layers_to_transform": None}
    return {**common, **own, **more}


def write_moelora(
    folder: Path, model: nn.Module, tasks: int = 3, experts: int = 4, rank: int = 8, shared: bool = True
) -> dict[str, Tensor]:
    """MOELoRA-peft, one gate for the model or one for each module; dead gates and twin names too."""
    draw, state = torch.Generator().manual_seed(2), {}
    for name, linear in linears(model, (*ATTENTION, *FFN)).items():
        out_features, in_features = linear.weight.shape
        state |= _gate(draw, f"{PREFIX}{name}.", tasks, experts)
        for i in range(experts):
            A, B = f"{PREFIX}{name}.lora_A.loraA.{i}", f"{PREFIX}{name}.lora_B.loraB.{i}"
            state[f"{A}.mlp.weight"] = state[f"{A}.weight"] = numbers(draw, rank // experts, in_features)
            state[f"{B}.mlp.weight"] = state[f"{B}.weight"] = numbers(draw, out_features, rank // experts)
    if shared:
        state |= _gate(draw, "", tasks, experts)
    own = {"expert_num": experts, "task_num": tasks, "task_embedding_dim": 64}
    own["peft_type"] = "MMOELORAS" if shared else "MMOELORA"
    write_json(folder / "adapter_config.json", peft_config(rank, 2 * rank, (*ATTENTION, *FFN), **own))
    write_pickle(folder / "adapter_model.bin", state)
    return state


def _gate(draw: torch.Generator, prefix: str, tasks: int, experts: int) -> dict[str, Tensor]:
    return {
        f"{prefix}lora_task_embedding.weight": torch.randn(tasks + 1, 64, generator=draw),
        f"{prefix}lora_gate.GateL.weight": numbers(draw, experts, 64),
    }


def write_moe_peft(
    folder: Path, model: nn.Module, kind: str, experts: int = 4, rank: int = 4, expert_rank: int | None = None
) -> dict[str, Tensor]:
    """MixLoRA, MoLA or LoRAMoE (`kind`: mixlora, mola, loramoe) as MoE-PEFT saves them."""
    draw, state, own_rank = torch.Generator().manual_seed(3), {}, expert_rank or rank
    for name, linear in linears(model, (*ATTENTION, *FFN)).items():
        module, block = f"{kind}.{name.removeprefix('model.')}", name.split(".")[-2]
        out_features, in_features = linear.weight.shape
        if block == "self_attn" and kind != "mola":
            state[f"{module}.lora_A.weight"] = numbers(draw, rank, in_features)
            state[f"{module}.lora_B.weight"] = numbers(draw, out_features, rank)
            continue
        gate = module if kind != "mixlora" else module.rpartition(".")[0]
        width = in_features if kind != "mixlora" else model.config.hidden_size
        state.setdefault(f"{gate}.moe_gate.weight", numbers(draw, experts, width))
        for i in range(experts):
            state[f"{module}.experts.{i}.lora_A.weight"] = numbers(draw, own_rank, in_features)
            state[f"{module}.experts.{i}.lora_B.weight"] = numbers(draw, out_features, own_rank)
    config = {"bias": "none", "peft_type": kind.upper(), "r": rank, "lora_alpha": 2 * rank}
    config |= {"lora_dropout": 0.05, "target_modules": [*ATTENTION, *FFN], "num_experts": experts}
    config |= {"routing_strategy": kind, "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}
    config |= {"top_k": 2} if kind != "loramoe" else {}
    config |= {"act_fn": "silu"} if kind == "mixlora" else {}
    if expert_rank:
        config["expert_lora"] = {"r": expert_rank, "lora_alpha": 3 * expert_rank, "lora_dropout": 0.05}
    write_json(folder / "adapter_config.json", config)
    write_pickle(folder / "adapter_model.bin", state)
    return state


def write_lora(folder: Path, model: nn.Module, rank: int = 4) -> dict[str, Tensor]:
    """A PEFT LoRA of the attention, as PEFT writes it."""
    draw, state = torch.Generator().manual_seed(4), {}
    for name, linear in linears(model, ATTENTION).items():
        out_features, in_features = linear.weight.shape
        state[f"{PREFIX}{name}.lora_A.weight"] = numbers(draw, rank, in_features)
        state[f"{PREFIX}{name}.lora_B.weight"] = numbers(draw, out_features, rank)
    write_json(folder / "adapter_config.json", peft_config(rank, 2 * rank, ATTENTION))
    save_file(state, folder / "adapter_model.safetensors")
    return state


def write_theirs(folder: Path, base: Path) -> None:
    """`lora`, `ming`, `moelora` and `mixlora` for a base model."""
    model = LlamaForCausalLM.from_pretrained(base)
    write_lora(folder / "lora", model)
    write_ming(folder / "ming", model)
    write_moelora(folder / "moelora", model)
    write_moe_peft(folder / "mixlora", model, "mixlora")


class Loop(nn.Module):
    """y = W x + sum_i g_i(x) delta_i(x), one expert after the other."""

    def __init__(self, base: nn.Linear, gates: Callable[[Tensor], Tensor], deltas: Sequence[Tensor]):
        super().__init__()
        self.base, self.gates, self.deltas = base, gates, list(deltas)

    def forward(self, x: Tensor) -> Tensor:
        y, gates = self.base(x), self.gates(x)
        for i, delta in enumerate(self.deltas):
            y = y + gates[..., i : i + 1] * F.linear(x, delta)
        return y


class BlockLoop(nn.Module):
    """y = sum_i g_i(x) FFN_i(x), with FFN_i = the SwiGLU block whose linears have their delta i."""

    def __init__(
        self, mlp: nn.Module, gates: Callable[[Tensor], Tensor], deltas: Mapping[str, Sequence[Tensor]]
    ):
        super().__init__()
        self.mlp, self.gates, self.deltas = mlp, gates, deltas

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        count = gates.shape[-1]
        return torch.stack([gates[..., i : i + 1] * self._expert(x, i) for i in range(count)]).sum(0)

    def _expert(self, x: Tensor, i: int) -> Tensor:
        gate, up, down = (self._linear(leaf, i) for leaf in FFN)
        return down(F.silu(gate(x)) * up(x))

    def _linear(self, leaf: str, i: int) -> Callable[[Tensor], Tensor]:
        weight = self.mlp.get_submodule(leaf).weight + self.deltas[leaf][i]
        return lambda x: F.linear(x, weight)


def top_k_gates(weight: Tensor, bias: Tensor | None = None, k: int = 2) -> Callable[[Tensor], Tensor]:
    """Softmax over the k largest logits, 0 elsewhere."""

    def gates(x: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        kept = logits >= logits.topk(k, dim=-1).values[..., -1:]
        return logits.masked_fill(~kept, -torch.inf).softmax(-1)

    return gates


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(TOKENS).logits
    return result


@torch.no_grad()
def imported_logits(adapter: Path, base: Path, tasks: Sequence[int] | None = None) -> Tensor:
    """Of our model with an imported adapter."""
    config, _, state = load_adapter(adapter)
    model = LlamaForCausalLM.from_pretrained(base)
    context = attach_adapters(model, config, seed=0)
    load_adapter_state(model, state)
    if tasks is None:
        return logits(model)
    with context.bind(BatchInputs.of_rows(torch.tensor(tasks))):
        return logits(model)
