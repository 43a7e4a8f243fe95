"""`generate`: the same answers one by one, in batches and under mixed tasks; its tasks; one clean process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.served import PROMPTS, SIZES, TASKS, gate_config, write_adapter, write_family
from support.tiny import ROOT, write_tiny_model

from moe_medical.config import MoloraConfig
from moe_medical.errors import ConfigError
from moe_medical.evaluation.generate import Sampling, generate_ids
from moe_medical.serving.adapted import Adapted, load_adapted, load_shared_base
from moe_medical.serving.answers import Generation, answer_all, answer_prompts

TOGETHER, ALONE = Generation(20, 8), Generation(20, 1)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.mark.parametrize(
    "config",
    [
        MoloraConfig(top_k=2, **SIZES),
        MoloraConfig(router="sequence", router_scope="block", top_k=2, **SIZES),
        MoloraConfig(preset="xlora", router="xlora", top_k=0, **SIZES),
        MoloraConfig(router="joint", num_tasks=2, top_k=2, **SIZES),
        MoloraConfig(experts="block", router_scope="block", top_k=2, **SIZES),
    ],
    ids=["token", "sequence", "xlora", "joint", "block"],
)
def test_answers_do_not_depend_on_the_batch(config: MoloraConfig, family: Path, tmp_path: Path) -> None:
    adapted = load_adapted(write_adapter(tmp_path / "adapter", family / "model", config))
    names = ["colour", None, "size", "colour,size"]
    tasks = [adapted.task_numbers(name, "task") for name in names]
    alone = answer_all(adapted, PROMPTS, tasks, ALONE)
    assert answer_all(adapted, PROMPTS, tasks, TOGETHER) == alone
    assert len(set(alone)) == len(PROMPTS)


def test_answers_are_those_of_the_evaluation(family: Path) -> None:
    adapted = load_adapted(family / "words")
    prompts = [adapted.chat.encode_prompt(p) for p in PROMPTS]
    made = generate_ids(adapted.model, prompts, adapted.chat, 20, torch.device("cpu")).tolist()
    texts = [adapted.chat.decode([token for token in line if token >= 0]).strip() for line in made]
    assert answer_all(adapted, PROMPTS, [()] * len(PROMPTS), TOGETHER) == texts


def test_a_mixed_batch_is_the_tasks_batches(family: Path) -> None:
    adapted = load_adapted(family / "gated")
    of_task = {
        name: answer_all(adapted, PROMPTS, [adapted.task_numbers(name, "")] * len(PROMPTS), TOGETHER)
        for name in ("colour", "size", "colour,size", None)
    }
    names = ["size", "colour", None, "colour,size"]
    mixed = answer_all(adapted, PROMPTS, [adapted.task_numbers(name, "") for name in names], TOGETHER)
    assert mixed == [of_task[name][i] for i, name in enumerate(names)]
    assert of_task[None] == of_task["colour,size"]  # the mean of all tasks
    assert len({tuple(answers) for answers in of_task.values()}) == 3


def test_a_seed_draws_the_same_in_any_batch(family: Path) -> None:
    adapted, tasks = load_adapted(family / "words"), [()] * len(PROMPTS)

    def answers(rows: int, seed: int | None, temperature: float = 0.9, top_p: float = 0.9) -> list[str]:
        how = Generation(20, rows, Sampling(temperature, top_p, seed))
        return answer_all(adapted, PROMPTS, tasks, how)

    assert answers(1, 5) == answers(4, 5)
    assert answers(4, 5) != answers(4, 50)
    greedy = answer_all(adapted, PROMPTS, tasks, TOGETHER)
    assert answers(4, None, top_p=1e-6) == greedy == answers(4, None, temperature=1e-30)


def test_adapters_share_the_bases_memory(family: Path) -> None:
    base = load_shared_base(family / "words")
    before = {name: p.data_ptr() for name, p in base.model.named_parameters()}
    words, gated = base.adapt(family / "words"), base.adapt(family / "gated")
    for adapted in (words, gated):
        own = {p.data_ptr() for p in adapted.model.parameters()}
        assert set(before.values()) <= own
    assert {name: p.data_ptr() for name, p in base.model.named_parameters()} == before
    alone = load_adapted(family / "words")
    assert _answers(words) == _answers(alone) != _answers(base.adapt(family / "other"))


def test_an_adapter_of_another_base_is_refused(family: Path, tmp_path: Path) -> None:
    foreign = write_tiny_model(tmp_path / "model", seed=9)
    adapter = write_adapter(tmp_path / "adapter", foreign, gate_config())
    with pytest.raises(ConfigError, match=r"meta\.base_model must be .*, the base model in use"):
        load_shared_base(family / "words").adapt(adapter)
    assert load_shared_base(family / "words", base=str(family / "model")).adapt(adapter)


@pytest.mark.parametrize(
    ("settings", "task", "rule"),
    [
        ({"unknown_task": "refuse"}, None, "--task must be given.*colour, size"),
        ({}, "shape", "--task must be one of colour, size, got 'shape'"),
        ({}, "colour,shape", "must be one of colour, size, got 'shape'"),
        ({"router": "token", "num_tasks": 0, "top_k": 2}, "shape", "must be one of colour, size"),
    ],
)
def test_an_unknown_task_is_refused(
    settings: dict[str, object], task: str | None, rule: str, family: Path, tmp_path: Path
) -> None:
    config = MoloraConfig(**({"router": "task", "num_tasks": 2, "top_k": 4} | SIZES | settings))  # type: ignore[arg-type]
    adapter = write_adapter(tmp_path / "adapter", family / "model", config)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1\n")
    with pytest.raises(ConfigError, match=rule):
        answer_prompts(adapter, prompts, TOGETHER, task)


def test_a_named_default_stands_in_for_a_missing_task(family: Path, tmp_path: Path) -> None:
    config = gate_config(unknown_task="size")
    adapted = load_adapted(write_adapter(tmp_path / "adapter", family / "model", config))
    assert adapted.task_numbers(None, "") == (TASKS.index("size"),)


def test_a_task_is_bound_only_while_answering(family: Path) -> None:
    adapted = load_adapted(family / "gated")
    _answers(adapted)
    assert adapted.context.inputs.task_ids_BS is None


@pytest.mark.parametrize(
    ("sampling", "rule"),
    [(Sampling(-1.0), "--temperature must be finite"), (Sampling(1.0, 0.0), r"--top-p must be in \(0, 1\]")],
)
def test_sampling_out_of_range_is_refused(sampling: Sampling, rule: str, family: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        answer_prompts(family / "words", None, Generation(sampling=sampling))


def test_lines_have_tasks_of_their_own(
    family: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "w1\nw2", "task": "size"}, {"prompt": "w1\nw2"}, {"prompt": "w3", "task": "size"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    printed = []
    for stream in (False, True):
        answer_prompts(family / "gated", file, Generation(8, 2, stream=stream), task="colour")
        printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert [{k: v for k, v in row.items() if k != "answer"} for row in printed[0]] == lines
    assert printed[0][0]["answer"] != printed[0][1]["answer"]
    assert sorted(printed[1], key=str) == sorted(printed[0], key=str)


def test_a_streamed_answer_is_the_answer(
    family: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
    answer_prompts(family / "words", None, Generation(20, stream=True))
    assert capsys.readouterr().out == _answers(load_adapted(family / "words"))[0] + "\n"


def test_one_device_needs_no_process_group(family: Path) -> None:
    code = (
        "import sys\n"
        "from moe_medical.cli import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "import torch\n"
        "assert 'deepspeed' not in sys.modules\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    command = [sys.executable, "-c", code, "generate", str(family / "words"), "--max-new-tokens", "3"]
    done = subprocess.run(command, input="w1\n", cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "w1"


def _answers(adapted: Adapted) -> list[str]:
    tasks = [adapted.task_numbers(None, "")] * len(PROMPTS)
    return answer_all(adapted, PROMPTS, tasks, TOGETHER)
