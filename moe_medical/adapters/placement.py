"""Which linear layers get which adapter: full module names against the patterns of the run file.

Decisions: a pattern matches the whole name (`re.fullmatch`); `molora` wins over `lora`; a pattern that
matches nothing is an error, because a misspelt one would silently train less than was asked for.
Torch-free, so that `moe-medical plan` can call it. It does not find linear layers: the caller names them,
and leaves out the output head and the embeddings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from moe_medical.config.adapters import MoloraConfig
from moe_medical.config.layer_names import CLOSING, SHARED_INPUT
from moe_medical.errors import ConfigError, Problem

AdapterKind = Literal["molora", "lora"]
NUM_EXAMPLES = 4

_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.")
"""Up to the number of the decoder layer."""


def match_modules(names: Iterable[str], config: MoloraConfig) -> dict[str, AdapterKind]:
    """Choose the adapter of each linear layer.

    Args:
        names: Full names of the model's linear layers, without the output head.
        config: Its `molora` and `lora` hold regular expressions.

    Returns:
        Name -> kind, for the layers that get an adapter, in the order of `names`.

    Raises:
        ConfigError: A pattern is no regular expression or matches no name, or no pattern is given.
    """
    ordered = list(names)
    problems: list[Problem] = []
    molora = _matched("molora", config.molora, ordered, problems)
    lora = _matched("lora", config.lora, ordered, problems)
    if not config.molora and not config.lora:
        problems.append(Problem("adapters.molora", "and adapters.lora name no layer", [], "Give a pattern."))
    if problems:
        raise ConfigError("adapter placement", problems)
    return {n: "molora" if n in molora else "lora" for n in ordered if n in molora or n in lora}


def shared_input_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Split full module names into groups of siblings that read the same input; most stand alone.

    Every name is in one group; groups come in the order of their first member.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        kin = next((siblings[0] for siblings in SHARED_INPUT if leaf in siblings), leaf)
        groups.setdefault((parent, kin), []).append(name)
    return [tuple(group) for group in groups.values()]


def depth_of(name: str) -> int:
    """Number of the decoder layer that a module is in, 0 outside of any."""
    found = _LAYER.match(name)
    return int(found[2]) if found else 0


def routing_scopes(names: Iterable[str], scope: str) -> dict[str, str]:
    """Routed layer -> the scope whose decision it follows, in the order in which they run.

    The first layer of a scope decides.

    Args:
        names: Full names of the routed layers, in the order in which the model has registered them.
        scope: `module`, `block`, `layer` or `model`; the last decides anew in each layer, too.
    """
    return {name: _scope_of(name, scope) for name in _as_they_run(names)}


def _as_they_run(names: Iterable[str]) -> list[str]:
    """Within a block, what opens it first, in the order of `SHARED_INPUT`, and what closes it last.

    Modules are registered in another order by some models: Phi-3 has o_proj before qkv_proj, OPT k before q.
    """
    ordered = list(names)
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in ordered))
    place = {block: i for i, block in enumerate(blocks)}
    return sorted(ordered, key=lambda name: (place[name.rpartition(".")[0]], _turn(name.rpartition(".")[2])))


def _turn(leaf: str) -> int:
    opening = [siblings.index(leaf) for siblings in SHARED_INPUT if leaf in siblings]
    return opening[0] if opening else 10 + (leaf in CLOSING)


def _scope_of(name: str, scope: str) -> str:
    if scope == "module":
        return name
    if scope == "block":
        return name.rpartition(".")[0]
    found = _LAYER.match(name)
    return found[1] if found else ""


def _matched(key: str, patterns: Sequence[str], names: list[str], problems: list[Problem]) -> set[str]:
    """Names that any pattern matches; appends a problem for each pattern that is of no use."""
    matched: set[str] = set()
    for index, pattern in enumerate(patterns):
        path = f"adapters.{key}[{index}]"
        try:
            found = {name for name in names if re.fullmatch(pattern, name)}
        except re.error as error:
            problems.append(Problem(path, f"must be a regular expression ({error})", pattern))
            continue
        if not found:
            fix = f"Linear layers of this model: {_examples(names)}."
            problems.append(Problem(path, "must match a linear layer's full name", pattern, fix))
        matched |= found
    return matched


def _examples(names: list[str]) -> str:
    """A few names that differ in more than the layer number."""
    distinct = {re.sub(r"\d+", "#", name): name for name in reversed(names)}
    examples = list(distinct.values())[::-1][:NUM_EXAMPLES]
    return ", ".join(examples) + (", ..." if len(distinct) > NUM_EXAMPLES else "") if examples else "none"
