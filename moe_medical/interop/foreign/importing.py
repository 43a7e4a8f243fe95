"""A foreign adapter folder -> ours: which program wrote it, what it holds, and one write at the end.

Decision: before anything is written the adapters are attached to the base without memory, and the state must
have exactly their names and shapes: what is written can be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from moe_medical.adapters.folder import CONFIG_FILE as OUR_CONFIG_FILE
from moe_medical.adapters.folder import FORMAT, save_adapter
from moe_medical.adapters.model import adapter_parameters, attach_adapters
from moe_medical.base_model.locate import locate_base
from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.schema import ModelSection
from moe_medical.errors import ConfigError, Problem
from moe_medical.interop.foreign import ming, moe_peft, moelora
from moe_medical.interop.foreign.base_layers import BaseLayers
from moe_medical.interop.foreign.peft import read_peft_lora
from moe_medical.interop.foreign.source import CONFIG_FILE, Imported, Settings, Source

Kind = Literal["auto", "peft", "ming", "moelora", "mixlora", "moe-peft"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_READERS: dict[str, Callable[[Source], Imported]] = {
    "peft": read_peft_lora,
    "ming": ming.read_ming,
    "moelora": moelora.read_moelora,
    "mixlora": moe_peft.read_moe_peft,
    "moe-peft": moe_peft.read_moe_peft,
}
_WRITERS = {"LORA": "peft", moelora.SHARED: "moelora", moelora.EACH: "moelora"} | dict.fromkeys(
    moe_peft.PRESET_OF, "moe-peft"
)
"""`peft_type` -> who writes it."""


@dataclass(frozen=True)
class ImportReport:
    """What was read and written."""

    adapter: Path
    kind: str
    made_for: str
    """Base model that the folder names."""
    config: MoloraConfig
    num_modules: int
    num_parameters: int
    dropped: Sequence[str]
    """Foreign tensors that their own program never uses."""

    def __str__(self) -> str:
        size = f"{self.num_modules} modules, {self.num_parameters:,} parameters"
        lines = [f"{self.adapter}: {self.config.preset} ({size}), from {self.kind}, made for {self.made_for}"]
        if self.dropped:
            examples = ", ".join(self.dropped[:2]) + (", ..." if len(self.dropped) > 2 else "")
            lines.append(f"left out {len(self.dropped)} tensors that were never used: {examples}")
        return "\n".join(lines)


def import_adapter(
    source: Path,
    out: Path,
    kind: Kind,
    base: str,
    tasks: Sequence[str] = (),
    allow_pickle: bool = False,
) -> ImportReport:
    """Read another program's adapter folder, and write ours; all or nothing.

    Args:
        source: The foreign folder.
        out: Our adapter folder.
        kind: Who wrote it; `auto` looks.
        base: Base model as in `model.name`: the one that the adapter was trained on.
        tasks: Names of the tasks, in the order of a task gate's ids.
        allow_pickle: Whether weights that are a pickle may be read, by the restricted loader.

    Raises:
        ConfigError: The folder is of no known kind or of another base, has a setting that we do not, or
            tensors that are missing, unexpected or of another shape, all of them named; `out` is taken.
        DataError: A file is unreadable.
        SecurityRefusal: A pickle without leave, or one that asks for more than tensors.
    """
    _refuse_target(source, out)
    reader = _kind_of(source) if kind == "auto" else kind
    layers = BaseLayers.of(locate_base(ModelSection(base)))
    imported = _reader(reader, source)(Source(source, layers, tuple(tasks), allow_pickle))
    state = _checked_state(imported, layers)
    made_for = str(Settings.read(source / CONFIG_FILE).values.get("base_model_name_or_path") or "unknown")
    meta: dict[str, Any] = {
        "base_model": base,
        "base_revision": None,
        "tasks": list(tasks),
        "label_sets": {},
        "imported_from": {"kind": reader, "base_model": made_for},
    }
    save_adapter(out, state, imported.config, meta)
    return ImportReport(
        adapter=out,
        kind=reader,
        made_for=made_for,
        config=imported.config,
        num_modules=len(imported.low_rank),
        num_parameters=sum(tensor.numel() for tensor in state.values()),
        dropped=imported.dropped,
    )


def _kind_of(source: Path) -> str:
    """From the files and the saved `peft_type`, never from the folder's name."""
    if not (source / CONFIG_FILE).is_file():
        rule = f"must be a folder with {CONFIG_FILE}"
        raise ConfigError("import", [Problem(str(source), rule, fix="Name an adapter folder.")])
    values = Settings.read(source / CONFIG_FILE).values
    if values.get("format") == FORMAT:
        raise ConfigError("import", [Problem(str(source), "is an adapter folder of ours already")])
    # Before `peft_type`: MING's is LORA too, for PEFT wrote its adapter_config.json, for the attention.
    if any((source / name).exists() for name in ming.EXPERT_FILES):
        return "ming"
    peft_type = values.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in _WRITERS:
        rule = f"must be one of {', '.join(_WRITERS)}"
        raise ConfigError(str(source), [Problem(f"{CONFIG_FILE}: peft_type", rule, peft_type)])
    return _WRITERS[peft_type]


def _reader(kind: str, source: Path) -> Callable[[Source], Imported]:
    """MoE-PEFT writes its plain LoRAs the way PEFT does."""
    if kind not in _READERS:
        raise ConfigError("import", [Problem("--from", f"must be one of {', '.join(KINDS)}", kind)])
    plain = kind == "moe-peft" and Settings.read(source / CONFIG_FILE).values.get("peft_type") == "LORA"
    return read_peft_lora if plain else _READERS[kind]


def _refuse_target(source: Path, out: Path) -> None:
    """Nothing but an older adapter of ours may be replaced; the file names alone do not tell."""
    config = out / OUR_CONFIG_FILE
    try:
        ours = json.loads(config.read_text(encoding="utf-8")).get("format") == FORMAT
    except FileNotFoundError:
        ours = True
    except (OSError, ValueError, AttributeError):  # no JSON, or no object
        ours = False
    if not ours or out.resolve() == source.resolve():
        rule = "must not hold another program's adapter"
        raise ConfigError("import", [Problem("--out", rule, str(out), "Choose another folder.")])


def _checked_state(imported: Imported, layers: BaseLayers) -> dict[str, Tensor]:
    """Our state, in the order of the base's modules, checked against what attaching would make.

    Raises:
        ConfigError: A name or shape differs.
    """
    # On the meta device, by the code that trains them: no second rule for names and shapes, and no memory.
    attach_adapters(layers.model, imported.config, seed=0)
    wanted = {name: tuple(p.shape) for name, p in adapter_parameters(layers.model).items()}
    given = _by_our_names(imported, wanted)
    wrong = [name for name, shape in wanted.items() if name not in given or tuple(given[name].shape) != shape]
    if names := sorted({*wrong, *(given.keys() - wanted.keys())}):
        rule = f"could not be put on {layers.name} as {imported.config.preset}"
        raise ConfigError("import", [Problem(name, rule) for name in names])
    return {name: given[name].contiguous() for name in wanted}


def _by_our_names(imported: Imported, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Full parameter name -> tensor; a router that all modules share is where the first layer has it."""
    state: dict[str, Tensor] = {}
    for module, factors in imported.low_rank.items():
        state |= {f"{module}.lora_A": factors.A, f"{module}.lora_B": factors.B}
    for module, factors in imported.shared.items():
        state |= {f"{module}.shared_A": factors.A, f"{module}.shared_B": factors.B}
    state |= {f"{module}.magnitude": magnitude for module, magnitude in imported.magnitudes.items()}
    # Which layer runs first is the base's business; attaching has put the shared router there.
    owner = next((name.rpartition(".router.")[0] for name in wanted if ".router." in name), "")
    for module, router in imported.routers.items():
        state |= {f"{module or owner}.router.{name}": tensor for name, tensor in router.items()}
    return state
