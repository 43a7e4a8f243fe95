"""Routers fitted to labels before training: what they know, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.tiny import write_tiny_run

from moe_medical.adapters.fitted_router import load_router
from moe_medical.adapters.model import attach_adapters, trainable_parameters
from moe_medical.adapters.routing import BatchInputs, RoutingContext, Sequences
from moe_medical.adapters.warm_start import start_from
from moe_medical.base_model import locate_base
from moe_medical.base_model.load import load_base
from moe_medical.config import load_config
from moe_medical.data.batches import IGNORE, Batch, collate
from moe_medical.data.chat import ChatFormat
from moe_medical.data.recipe import load_mixture
from moe_medical.data.tasks import load_tasks
from moe_medical.errors import ConfigError, DataError
from moe_medical.training.router_fit import fit_router
from moe_medical.training.router_labels import label_tasks

TASKS = ["last_word", "even"]
OWN = {"num_experts": 2, "top_k": 1, "renormalise": False, "rank": 4, "alpha": 8}
MED_MOE = {**OWN, "preset": "med_moe", "router": "sequence", "router_from": "router"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of Med-MoE's kind, and the router that was fitted for it."""
    folder = tmp_path_factory.mktemp("fitted")
    run = write_tiny_run(folder, adapters=MED_MOE)
    fit_router(run, [], folder / "router", rows=20)
    return run, folder / "router"


def test_a_fitted_router_knows_its_labels(fitted: tuple[Path, Path]) -> None:
    router = load_router(fitted[1])
    assert router.labels == tuple(TASKS)
    assert (router.level, router.scope, router.rows) == ("sequence", "model", {"last_word": 20, "even": 20})
    assert router.label_of_task == {task: task for task in TASKS}
    name = "model.layers.0.mlp"
    assert {key: tuple(value.shape) for key, value in router.tensors.items()} == {
        f"{name}.router.weight": (2, 32),
        f"{name}.router.bias": (2,),
    }
    assert router.accuracy == {name: 1.0}
    assert router.label_accuracy == {name: {"last_word": 1.0, "even": 1.0}}


def started(run: Path) -> tuple[torch.nn.Module, RoutingContext, Batch, Sequences]:
    """The run's model with its fitted router, and rows that the router has not seen, six of each task."""
    config = load_config(run)
    base, adapters = locate_base(config.model), config.adapters
    model = load_base(base, "float32")
    context = attach_adapters(model, adapters, config.run.seed)
    start_from(model, adapters, config.run.seed, None)
    chat = ChatFormat.from_folder(base.folder, config.data.system_prompt, config.data.max_length)
    rows = [
        (chat.encode(example.prompt, example.target), number)
        for number, task in enumerate(load_tasks(config.data, "test", chat))
        for example in task.evaluation[:6]
    ]
    batch = collate([row for row, _ in rows], [task for _, task in rows], chat.pad_id)
    prompts = batch.token_mask_BS & (batch.labels_BS == IGNORE)
    return model, context, batch, Sequences.of(batch.position_ids_BS, prompts)


def test_at_run_time_it_sends_new_rows_to_their_expert(fitted: tuple[Path, Path]) -> None:
    """It must see then what it was fitted on: the layer, the norm, the prompt and no padding."""
    model, context, batch, sequences = started(fitted[0])
    with context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS, sequences=sequences)):
        model(batch.input_ids_BS, attention_mask=batch.token_mask_BS, position_ids=batch.position_ids_BS)
        chosen = context.record.routings["model.layers.0.mlp"].expert_ids_TK.view(batch.input_ids_BS.shape)
    assert torch.equal(chosen[batch.token_mask_BS], batch.task_ids_BS[batch.token_mask_BS])


def test_it_stays_as_it_was_fitted_while_experts_train(fitted: tuple[Path, Path]) -> None:
    model, context, batch, sequences = started(fitted[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.1)
    for _ in range(2):
        with context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS, sequences=sequences)):
            model(batch.input_ids_BS, attention_mask=batch.token_mask_BS).logits.square().mean().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trainable_in(model))
    assert not any("router" in name for name in changed)
    assert any(name.endswith("up_proj.weight") for name in changed)


def trainable_in(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("settings", "routers", "with_bias"),
    [
        ({"router_scope": "module"}, 6, True),
        ({"router_scope": "block", "router_bias": False}, 2, False),
    ],
)
def test_tokens_of_each_layer_are_told_apart_better_than_by_chance(
    settings: dict[str, object], routers: int, with_bias: bool, tmp_path: Path
) -> None:
    run = write_tiny_run(tmp_path, adapters={**OWN, **settings})
    fit_router(run, [], tmp_path / "router", rows=16)
    router = load_router(tmp_path / "router")
    assert len(router.accuracy) == routers
    assert len(router.tensors) == routers * (2 if with_bias else 1)
    assert min(router.accuracy.values()) > 0.65
    assert all(name.endswith("gate_proj") for name in router.accuracy) == (routers == 2)


def test_the_order_of_labels_is_that_of_the_file_and_not_of_the_recipe(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path, adapters={**OWN, "router": "sequence", "router_scope": "layer"})
    (tmp_path / "labels.json").write_text(json.dumps({"even": "parity", "last_word": "copy"}))
    fit_router(run, [], tmp_path / "router", labels=str(tmp_path / "labels.json"), rows=16)
    router = load_router(tmp_path / "router")
    assert router.labels == ("parity", "copy")
    assert router.label_of_task == {"last_word": "copy", "even": "parity"}
    assert list(router.rows) == ["parity", "copy"]
    assert min(router.accuracy.values()) > 0.9
    settings = yaml.safe_load(run.read_text())
    settings["adapters"] |= {"router_from": "router", "freeze_router": True}
    run.write_text(yaml.safe_dump(settings))
    model, context, batch, sequences = started(run)
    with context.bind(BatchInputs(batch.token_mask_BS, batch.task_ids_BS, sequences=sequences)):
        model(batch.input_ids_BS, attention_mask=batch.token_mask_BS, position_ids=batch.position_ids_BS)
        chosen = context.record.routings["model.layers.1.mlp.gate_proj"].expert_ids_TK.view(
            batch.input_ids_BS.shape
        )
    assert torch.equal(chosen[batch.token_mask_BS], 1 - batch.task_ids_BS[batch.token_mask_BS])


@pytest.mark.parametrize(
    ("settings", "labels", "said"),
    [
        ({"num_experts": 3}, "task", r"num_experts must be 2, one for each label \(last_word, even\), got 3"),
        ({"router": "threshold", "top_k": 0}, "task", "adapters.router must be token or sequence"),
        ({"experts_per_layer": [2, 2]}, "task", "adapters.experts_per_layer must be empty"),
        ({}, "ct,mri", "must have exactly one of the tags ct, mri"),
        ({}, "labels.yaml", "even must have a label"),
    ],
)
def test_what_cannot_be_fitted_is_refused_and_nothing_written(
    settings: dict[str, object], labels: str, said: str, tmp_path: Path
) -> None:
    run = write_tiny_run(tmp_path, adapters={**OWN, **settings})
    (tmp_path / "labels.yaml").write_text("last_word: copy\n")
    before = sorted(tmp_path.iterdir())
    labels = str(tmp_path / labels) if labels.endswith("yaml") else labels
    with pytest.raises(ConfigError, match=said):
        fit_router(run, [], tmp_path / "router", labels=labels, rows=4)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that are not a fitted router's"):
        fit_router(tmp_path / "run.yaml", [], tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_labels_come_from_tags_in_the_order_asked_for_or_from_a_field(tmp_path: Path) -> None:
    specs = load_mixture(write_tags(tmp_path, last_word=["b", "x"], even=["a"])).tasks
    assert label_tasks("a,b", specs) == ({"last_word": "b", "even": "a"}, ["a", "b"])
    assert label_tasks("kind", specs)[1] == ["generation", "yes_no"]
    with pytest.raises(ConfigError, match=r"last_word.yaml: tags must have exactly one of the tags x, b, a"):
        label_tasks("x,b,a", specs)
    with pytest.raises(DataError, match=r"gone.yaml: is not readable"):
        label_tasks(str(tmp_path / "gone.yaml"), specs)


def write_tags(folder: Path, **tags: list[str]) -> Path:
    from support.tiny import write_tiny_tasks

    mixture = write_tiny_tasks(folder)
    for name, given in tags.items():
        spec = yaml.safe_load((folder / f"{name}.yaml").read_text())
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**spec, "tags": given}))
    return mixture


def test_loading_is_strict(fitted: tuple[Path, Path], tmp_path: Path) -> None:
    about, tensors = (
        json.loads((fitted[1] / "router.json").read_text()),
        load_file(fitted[1] / "router.safetensors"),
    )
    name = "model.layers.0.mlp.router"

    def refused(said: str, about: object = about, tensors: dict[str, torch.Tensor] = tensors) -> None:
        (tmp_path / "router.json").write_text(json.dumps(about))
        save_file(tensors, tmp_path / "router.safetensors")
        with pytest.raises(ConfigError, match=said):
            load_router(tmp_path)

    with pytest.raises(ConfigError, match=r"router.json is missing"):
        load_router(tmp_path)
    refused("labels must be a list of two names at least, each once", {**about, "labels": ["even", "even"]})
    refused("level must be one of token, sequence", {**about, "level": "task"})
    refused("extra is not a known key", {**about, "extra": 1})
    refused("format_version must be 1", {**about, "format_version": 2})
    refused(f"{name}.weight is missing", tensors={f"{name}.bias": tensors[f"{name}.bias"]})
    refused("must have a row for each of the 2 labels", tensors={**tensors, f"{name}.bias": torch.zeros(3)})
    refused("x.router.weight is not of a router", tensors={**tensors, "x.router.weight": torch.zeros(2, 1)})
    (tmp_path / "router.safetensors").write_text("no")
    (tmp_path / "router.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match="is not a readable safetensors file"):
        load_router(tmp_path)
