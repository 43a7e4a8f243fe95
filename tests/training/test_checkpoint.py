"""Checkpoints are whole or not there, damage is noticed and stepped over, and nothing in them is run."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import ROOT

from moe_medical.distributed.state import TrainableState
from moe_medical.errors import DataError, StorageError
from moe_medical.training.checkpoint import Checkpoint, CheckpointFolder, check_same_tensors

FILES = ["MANIFEST.json", "adapters.safetensors", "optimizer.safetensors", "state.json"]
LAYOUT = {"world_size": 1, "zero_stage": 2, "ep_size": 1}


def _checkpoint(step: int) -> Checkpoint:
    rng = torch.Generator().manual_seed(step)
    shapes = {"layers.0.lora_A": (2, 3, 4), "layers.0.router.bias": (5,)}

    def tensors() -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}

    state = {"tokens": 10**12 + step, "meter": [[0.1 + step, 3.0, 2.0]], "mixture": {"history": [[0, [0.7]]]}}
    return Checkpoint(TrainableState(tensors(), {"exp_avg": tensors(), "exp_avg_sq": tensors()}, step), state)


def _save(folder: CheckpointFolder, *steps: int) -> list[Path]:
    return [folder.save(_checkpoint(step), LAYOUT) for step in steps]


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


@pytest.fixture
def saved(folder: CheckpointFolder) -> Path:
    """Checkpoints of steps 2 and 4; the newer one's folder."""
    return _save(folder, 2, 4)[1]


def _set_aside(folder: CheckpointFolder) -> list[str]:
    return [p.name.split("-")[1] for p in folder.root.glob("*.corrupt-*")]


def test_what_is_loaded_is_what_was_saved(folder: CheckpointFolder, saved: Path) -> None:
    loaded, wanted = folder.load(4), _checkpoint(4)
    mine, theirs = loaded.trainable, wanted.trainable
    for key, a, b in [("parameters", mine.parameters, theirs.parameters)] + [
        (key, mine.moments[key], theirs.moments[key]) for key in theirs.moments
    ]:
        assert a.keys() == b.keys(), key
        assert all(torch.equal(a[name], b[name]) for name in b), key
    assert mine.step == 4
    assert loaded.state == {"step": 4, **wanted.state}
    assert sorted(p.name for p in saved.iterdir()) == FILES
    assert json.loads((folder.root / "latest.json").read_text()) == {"step": 4}


def test_an_existing_step_is_never_overwritten(folder: CheckpointFolder, saved: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in saved.iterdir()}
    folder.save(Checkpoint(_checkpoint(9).trainable, {}), LAYOUT)
    other = _checkpoint(9)
    other.trainable.step = 4
    assert folder.save(other, LAYOUT) == saved
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in saved.iterdir()} == before


def test_keep_prunes_the_oldest_and_stale_drafts(folder: CheckpointFolder) -> None:
    (folder.root / "step-00000002.tmp-1234").mkdir(parents=True)
    _save(folder, 2, 4, 10, 100)
    assert sorted(p.name for p in folder.root.iterdir()) == ["latest.json", "step-00000010", "step-00000100"]


def test_no_folder_is_no_checkpoint(folder: CheckpointFolder) -> None:
    assert folder.recover() is None


# Killed or refused in the middle of a save

EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")
"""Audit events of operations on the disk; `safetensors` writes outside Python, between two of them."""


def _save_dying_at(folder: CheckpointFolder, operation: int) -> bool:
    """Save in a child that is gone at once when it begins its n-th file operation; whether it was."""
    child = os.fork()
    if child == 0:
        _die_at(folder.root, operation)
        folder.save(_checkpoint(6), LAYOUT)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def _die_at(root: Path, operation: int) -> None:
    import sys

    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(root)):
            seen += 1
            if seen == operation:
                os._exit(9)

    sys.addaudithook(hook)


def test_a_kill_at_any_file_operation_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    original = CheckpointFolder(tmp_path / "original", keep=2)
    _save(original, 2, 4)
    found = []
    for operation in range(1, 100):
        folder = CheckpointFolder(tmp_path / f"killed-{operation}", keep=2)
        shutil.copytree(original.root, folder.root)
        died = _save_dying_at(folder, operation)
        found.append(folder.recover())
        assert _set_aside(folder) == []
        assert folder.load(found[-1] or 0).trainable.step == found[-1]
        _save(folder, 8)  # the next save works and sweeps up
        assert not list(folder.root.glob("*.tmp-*"))
        if not died:
            break
    assert not died
    assert len(found) > 10
    assert found == sorted(found)  # the older one until the rename, then the new one
    assert set(found) == {4, 6}


@pytest.mark.parametrize(
    "call", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.rename", "pathlib.Path.replace"]
)
def test_a_refusing_disk_leaves_the_older_one(
    call: str, folder: CheckpointFolder, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, refuse)
    with pytest.raises(StorageError, match=r"No space left on device.*Last good step: 4"):
        _save(folder, 6)
    monkeypatch.undo()
    assert folder.recover() == 4
    assert sorted(p.name for p in folder.root.glob("step-*")) == ["step-00000002", "step-00000004"]


# Damage


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "garbled", "longer"])
def test_a_damaged_file_is_stepped_over(
    name: str, damage: str, folder: CheckpointFolder, saved: Path
) -> None:
    path = saved / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        broken = {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "garbled": b"\xff" * len(content),
            "longer": content + b"x",
        }
        path.write_bytes(broken[damage])
    assert folder.recover() == 2
    assert _set_aside(folder) == ["00000004.corrupt"]
    assert folder.recover() == 2
    assert _save(folder, 4)[0].is_dir()  # its place is free again
    assert folder.recover() == 4


@pytest.mark.parametrize("name", FILES[1:])
def test_one_flipped_bit_anywhere_is_noticed(name: str, folder: CheckpointFolder, saved: Path) -> None:
    positions = random.Random(name).sample(range((saved / name).stat().st_size), 20)
    for position in positions:
        copy = CheckpointFolder(folder.root.with_name(f"flipped-{position}"), keep=2)
        shutil.copytree(folder.root, copy.root)
        _flip(copy.root / saved.name / name, position)
        assert copy.recover() == 2, position


MANIFESTS = {
    "no object": [],
    "nothing": {},
    "no version": {"format_version": None},
    "a version in words": {"format_version": "one"},
    "another step": {"step": 2},
    "no step": {"step": None},
    "no files": {"files": {}},
    "names without hashes": {"files": ["adapters.safetensors", "optimizer.safetensors", "state.json"]},
    "hashes of nothing": {"files": dict.fromkeys(FILES[1:])},
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_wrong_manifest_is_damage(case: str, folder: CheckpointFolder, saved: Path) -> None:
    path, change = saved / "MANIFEST.json", MANIFESTS[case]
    path.write_text(json.dumps(json.loads(path.read_text()) | change if change else change))
    assert folder.recover() == 2
    assert _set_aside(folder) == ["00000004.corrupt"]


def test_a_renamed_checkpoint_is_damage(folder: CheckpointFolder, saved: Path) -> None:
    saved.rename(saved.with_name("step-00000006"))
    assert folder.recover() == 2
    assert _set_aside(folder) == ["00000006.corrupt"]


def test_all_damaged_is_no_checkpoint(folder: CheckpointFolder, saved: Path) -> None:
    for step in ("step-00000002", "step-00000004"):
        (folder.root / step / "state.json").unlink()
    assert folder.recover() is None
    assert sorted(_set_aside(folder)) == ["00000002.corrupt", "00000004.corrupt"]


@pytest.mark.parametrize("pointer", [None, "", '{"step": 2}', '{"step": 99}', '{"step": "../../etc"}', "\0"])
def test_the_pointer_does_not_matter(pointer: str | None, folder: CheckpointFolder, saved: Path) -> None:
    latest = folder.root / "latest.json"
    latest.unlink()
    if pointer is not None:
        latest.write_text(pointer)
    assert folder.recover() == 4


@pytest.mark.parametrize("name", ["step-²", "step-4", "step-", "step-00000009.bak", "steps", "step-0000000٤"])
def test_other_names_are_left_alone(name: str, folder: CheckpointFolder, saved: Path) -> None:
    (folder.root / name).mkdir()
    assert folder.recover() == 4
    assert (folder.root / name).is_dir()


def test_a_newer_format_is_refused_and_kept(folder: CheckpointFolder, saved: Path) -> None:
    path = saved / "MANIFEST.json"
    path.write_text(json.dumps({"format_version": 3, "layers": "as nobody knows yet"}))
    with pytest.raises(DataError, match=r"step-00000004 has format 3; this version reads 2"):
        folder.recover()
    assert saved.is_dir()
    assert _set_aside(folder) == []


OLD_STATE: dict[str, Any] = {
    "samples": 32,
    "tokens": 900,
    "truncated": 3,
    "meter": [[1.5, 6.0, 2.0], [0.5, 4.0, 1.0]],
    "task_weights": {},
    "mixture": {"plan": {"seed": 1}, "rule": None, "sums": [[1.0, 2.0], [3.0, 4.0]], "evaluations": {}},
    "guard": {
        "guard": {"weight": [0.5, 1.0]},
        "factors": [0.5, 1.0],
        "looked": 2,
        "stopped": False,
        "sums": [[5.0, 6.0], [7.0, 8.0]],
    },
    "identity": {"version": 2},
}
"""Of format 1, in which what looked at a run had keys and sums of its own."""


def test_a_checkpoint_of_format_1_is_read(folder: CheckpointFolder) -> None:
    (saved,) = _save(folder, 4)
    _rewrite_as_format_1(saved, OLD_STATE)
    assert folder.recover() == 4
    assert folder.load(4).state == {
        "step": 4,
        "samples": 32,
        "tokens": 900,
        "task_weights": {},
        "fingerprint": {"version": 2},
        "callbacks": {
            "task_losses": {
                "log": [[1.5, 0.5], [6.0, 4.0], [2.0, 1.0]],
                "mixture": [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]],
                "guard": [[5.0, 6.0], [7.0, 8.0], [0.0, 0.0]],
            },
            "step_log": {"truncated": 3, "speed": {}},
            "mixture": {"plan": {"seed": 1}, "rule": None, "evaluations": {}},
            "guard": {
                "guard": {"weight": [0.5, 1.0]},
                "factors": [0.5, 1.0],
                "probed": 2,
                "stopped": False,
            },
        },
    }


def test_without_a_guard_format_1_has_no_state_of_one(folder: CheckpointFolder) -> None:
    (saved,) = _save(folder, 4)
    _rewrite_as_format_1(saved, {**OLD_STATE, "guard": {**OLD_STATE["guard"], "guard": None}})
    assert "guard" not in folder.load(4).state["callbacks"]


def _rewrite_as_format_1(saved: Path, state: dict[str, Any]) -> None:
    (saved / "state.json").write_text(json.dumps({"step": 4, **state}))
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    content = (saved / "state.json").read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    manifest |= {"format_version": 1, "files": manifest["files"] | {"state.json": entry}}
    (saved / "MANIFEST.json").write_text(json.dumps(manifest))


def test_looking_for_the_newest_changes_nothing(folder: CheckpointFolder, saved: Path) -> None:
    (saved / "state.json").write_text("damaged")
    names = sorted(path.name for path in folder.root.iterdir())
    assert folder.newest_step() == 2
    assert sorted(path.name for path in folder.root.iterdir()) == names


def test_other_tensors_are_refused_by_name(folder: CheckpointFolder) -> None:
    checkpoint = _checkpoint(2)
    shapes = {name: tuple(t.shape) for name, t in checkpoint.trainable.parameters.items()}
    check_same_tensors(checkpoint, shapes)
    bias = shapes.pop("layers.0.router.bias")
    with pytest.raises(DataError, match=r"extra \['layers.0.router.bias'\]"):
        check_same_tensors(checkpoint, shapes)
    with pytest.raises(DataError, match=r"missing \['layers.9.lora_A'\]"):
        check_same_tensors(checkpoint, shapes | {"layers.0.router.bias": bias, "layers.9.lora_A": (1,)})
    with pytest.raises(DataError, match=r"other shape \['layers.0.router.bias'\]"):
        check_same_tensors(checkpoint, shapes | {"layers.0.router.bias": (4,)})


# Nothing in a checkpoint is run or leads elsewhere


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_in_the_folder_are_never_opened(
    folder: CheckpointFolder, saved: Path, tmp_path: Path
) -> None:
    planted = pickle.dumps(_Payload(tmp_path / "ran"))
    for name in ("mp_rank_00_model_states.pt", "optimizer.pt", "rng.pkl", "adapters.safetensors.bin"):
        (saved / name).write_bytes(planted)
        (folder.root / name).write_bytes(planted)
    assert folder.recover() == 4
    folder.load(4)
    _save(folder, 6, 8)
    for name in FILES[1:]:  # and in the place of a file that is opened: a wrong hash
        target = folder.root / "step-00000008" / name
        content = target.read_bytes()
        target.write_bytes(planted)
        with pytest.raises(Exception, match=r".") as refusal:
            folder.load(8)
        assert not isinstance(refusal.value, pickle.UnpicklingError)
        target.write_bytes(content)
    assert not (tmp_path / "ran").exists()


def test_names_in_a_manifest_are_not_followed(folder: CheckpointFolder, saved: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "outside")  # whoever opens it to read waits for ever
    path = saved / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for name in ("../../outside", str(tmp_path / "outside")):
        manifest["files"] = {name: {"sha256": "0" * 64, "bytes": 0}, **manifest["files"]}
    path.write_text(json.dumps(manifest))
    assert folder.recover() == 4


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}


RESTRICTED_READER = ROOT / "moe_medical" / "interop" / "foreign" / "tensors.py"
"""Reads other programs' adapters, on request: tensors only, after a look at what the file asks for."""


@pytest.mark.parametrize("path", sorted((ROOT / "moe_medical").rglob("*.py")), ids=lambda p: p.name)
def test_the_package_never_runs_what_it_reads(path: Path) -> None:
    found = [problem for node in ast.walk(ast.parse(path.read_text())) for problem in _dangers(node)]
    allowed = ["pickle.UnpicklingError", "torch.load"] if path == RESTRICTED_READER else []
    assert found == allowed


def test_the_restricted_reader_takes_nothing_but_tensors() -> None:
    calls = [
        node for node in ast.walk(ast.parse(RESTRICTED_READER.read_text())) if isinstance(node, ast.Call)
    ]
    (load,) = (call for call in calls if ast.unparse(call.func) == "torch.load")
    assert {k.arg: ast.unparse(k.value) for k in load.keywords}["weights_only"] == "True"


def _dangers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
    if isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{a.name}" for a in node.names}
        foreign = (node.module or "").split(".")[0] in FORBIDDEN_MODULES
        return sorted(names if foreign else names & FORBIDDEN_CALLS)
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        shell = any(k.arg == "shell" for k in node.keywords)
        pickled = any(k.arg in ("allow_pickle", "weights_only") for k in node.keywords)
        return [name] if name in FORBIDDEN_CALLS or shell or pickled else []
    return []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(p)",
        "from torch import load",
        "eval(x)",
        "exec(x)",
        "subprocess.run(c, shell=True)",
        "numpy.load(p, allow_pickle=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert [d for node in ast.walk(ast.parse(code)) for d in _dangers(node)] != []
