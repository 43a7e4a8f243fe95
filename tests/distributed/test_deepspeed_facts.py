"""What DeepSpeed does that the code works around: a fact that changes makes a work-around needless, or wrong.
`test_deepspeed_settings.py` has the settings that are refused.

Each variant undoes one decision of distributed/ and trains three steps with experts spread over 2 ranks; what
comes out is compared with plain PyTorch. Clipping binds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from support.ranks import on_ranks
from support.tiny import write_tiny_run
from support.training import Layout, apart, reference, step, worst, write_zero_settings

if TYPE_CHECKING:
    from moe_medical.distributed.topology import Topology
    from moe_medical.training.trainer import Trainer

STEPS = 3
ADAPTERS = {"num_experts": 4, "top_k": 2, "rank": 4, "alpha": 8, "dropout": 0.0}
TRAINING = {"steps": STEPS, "global_batch": 8, "learning_rate": 0.01, "epsilon": 1e-4, "clip_norm": 0.1}


# Decisions undone


def _no_marks() -> AbstractContextManager[Any]:
    """Experts are sharded, but DeepSpeed is not told."""
    from moe_medical.distributed.expert_group import ExpertGroup

    return patch.object(ExpertGroup, "mark", lambda *_: None)


def _marks_without_module() -> AbstractContextManager[Any]:
    """Experts are told by attributes alone."""
    return _after_marks(lambda model, _: delattr(model, "expert_parallel_marker"))


def _module_under_zero3() -> AbstractContextManager[Any]:
    """The module that switches expert gradients on at the other stages."""
    from moe_medical.distributed.expert_group import _marker

    return _after_marks(lambda model, group: model.add_module("marker", _marker(group, 4)))


def _no_marks_of_zero3() -> AbstractContextManager[Any]:
    """Only the attributes that do at the other stages."""

    def unmark(model: Any, _: Any) -> None:
        for parameter in model.parameters():
            for key in [key for key in vars(parameter) if key.startswith("ds_zero_")]:
                delattr(parameter, key)

    return _after_marks(unmark)


def _after_marks(change: Callable[[Any, Any], None]) -> AbstractContextManager[Any]:
    from moe_medical.distributed.expert_group import ExpertGroup

    original = ExpertGroup.mark

    def mark(self: ExpertGroup, model: Any, *rest: Any) -> None:
        original(self, model, *rest)
        change(model, self)

    return patch.object(ExpertGroup, "mark", mark)


@contextmanager
def _clipping_by_deepspeed() -> Iterator[None]:
    """At stage 0, where it averages the ranks' norms."""
    from moe_medical.distributed.engine import Engine

    ours = patch.object(Engine, "_clip_unsharded", lambda _: 0.0)
    with ours, _settings(lambda settings: settings | {"gradient_clipping": TRAINING["clip_norm"]}):
        yield


def _clipping_left_out() -> AbstractContextManager[Any]:
    return _settings(lambda settings: {k: v for k, v in settings.items() if k != "gradient_clipping"})


def _settings(change: Callable[[dict[str, Any]], dict[str, Any]]) -> AbstractContextManager[Any]:
    from moe_medical.distributed import engine

    original = engine.deepspeed_settings
    return patch.object(engine, "deepspeed_settings", lambda *args: change(original(*args)))


VARIANTS: Mapping[str, tuple[int, Callable[[], AbstractContextManager[Any]]]] = {
    **{f"as it is, zero{stage}": (stage, nullcontext) for stage in range(4)},
    "no marks, zero1": (1, _no_marks),
    "no marks, zero2": (2, _no_marks),
    "no marks, zero3": (3, _no_marks),
    "no module, zero2": (2, _marks_without_module),
    "module, zero3": (3, _module_under_zero3),
    "no marks of zero3": (3, _no_marks_of_zero3),
    "clipping by DeepSpeed, zero0": (0, _clipping_by_deepspeed),
}


# What a rank does


def _try_variants(run: str) -> dict[str, Any]:
    """By variant, how far the trained tensors are from plain PyTorch, or the error; and what engines show."""
    from moe_medical.distributed.topology import start_distributed, stop_distributed

    expected = torch.load(Path(run).with_name("reference.pt"))
    topology = start_distributed(Layout().configured(run, 2).parallel)
    seen: dict[str, Any] = {}
    for name, (stage, undone) in VARIANTS.items():
        with undone():
            seen[name] = _outcome(run, topology, stage, expected)
    seen["inputs"] = {str(stage): _inputs(_start(run, topology, stage)) for stage in (2, 3)}
    seen["moments"] = _moments(_start(run, topology, 2))
    with _clipping_left_out():
        seen["clipping"] = _start(run, topology, 2).engine.deepspeed.gradient_clipping()
    stop_distributed()
    return seen


def _start(run: str, topology: Topology, stage: int) -> Trainer:
    from support.training import start

    return start(Layout(zero=stage, ep_size=2, exchange="tokens"), run, topology)


def _outcome(run: str, topology: Topology, stage: int, expected: Mapping[str, Any]) -> float | str:
    from moe_medical.distributed.state import gather_parameters

    try:
        trainer = _start(run, topology, stage)
        for number in range(STEPS):
            step(trainer, number)
        return worst(apart(gather_parameters(trainer.engine), expected))[1]
    except (AssertionError, TypeError) as e:
        return type(e).__name__


def _inputs(trainer: Trainer) -> list[bool]:
    """Whether gate_proj and up_proj of a block are called with one object, and with one memory."""
    seen: dict[str, torch.Tensor] = {}
    for name, module in trainer.engine.module.named_modules():
        if name.endswith(("0.mlp.gate_proj", "0.mlp.up_proj")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    step(trainer, 0)
    gate, up = seen.values()
    return [gate is up, gate.data_ptr() == up.data_ptr()]


def _moments(trainer: Trainer) -> dict[str, list[bool]]:
    """Whether the moments of shared parameters, and of experts, can be read before they are linked again."""
    from deepspeed.utils import safe_get_full_optimizer_state

    step(trainer, 0)
    engine = trainer.engine
    readable: dict[str, list[bool]] = {"shared": [], "experts": []}
    for name, parameter in engine.named.items():
        kind = "experts" if name in engine.experts else "shared"
        try:
            readable[kind].append(safe_get_full_optimizer_state(parameter, "exp_avg") is not None)
        except (AttributeError, KeyError, ValueError, TypeError):
            readable[kind].append(False)
    return {kind: sorted(set(values)) for kind, values in readable.items()}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("facts")
    run = write_tiny_run(folder, adapters=ADAPTERS, training=TRAINING)
    write_zero_settings(folder)
    torch.save(reference(str(run), STEPS).tensors, folder / "reference.pt")
    return on_ranks(2, _try_variants, folder, str(run))[0]


@pytest.mark.parametrize("stage", range(4))
def test_nothing_undone_is_right(stage: int, facts: dict[str, Any]) -> None:
    assert facts[f"as it is, zero{stage}"] < 1e-5


@pytest.mark.parametrize(
    "variant",
    [
        "no marks, zero1",
        "no marks, zero2",
        "no marks, zero3",
        "no marks of zero3",
        "clipping by DeepSpeed, zero0",
    ],
)
def test_silently_wrong_without(variant: str, facts: dict[str, Any]) -> None:
    assert facts[variant] > 1e-3


def test_refused(facts: dict[str, Any]) -> None:
    assert facts["no module, zero2"] == "TypeError"
    assert facts["module, zero3"] == "AssertionError"


def test_zero3_hands_each_layer_its_own_alias_of_a_shared_input(facts: dict[str, Any]) -> None:
    assert facts["inputs"] == {"2": [True, True], "3": [False, True]}


def test_moments_of_experts_must_be_linked_again(facts: dict[str, Any]) -> None:
    assert facts["moments"] == {"shared": [True], "experts": [False]}


def test_clipping_that_is_left_out_is_on(facts: dict[str, Any]) -> None:
    assert facts["clipping"] == 1.0
