"""The base model as an import sees it: the linear layers by name and size, without any weight.

Foreign names differ in what stands before the number of the decoder layer: PEFT writes the wrapped model's
names, MixLoRA its own prefix, and transformers has renamed the outer modules of some models. What follows the
number is the same, so that is what is compared where a name as a whole is not known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from moe_medical.adapters.layer import linear_sizes
from moe_medical.adapters.model import adaptable_modules
from moe_medical.base_model.load import empty_base
from moe_medical.base_model.locate import BaseModel
from moe_medical.errors import ConfigError, Problem

NUM_EXAMPLES = 4
_SIDE = re.compile(r"(?P<module>.+?)\.((experts\.\d+|share_experts)\.)?lora_(?P<side>[AB])[._].+")


@dataclass(frozen=True)
class BaseLayers:
    """Linear layers that an adapter can have."""

    name: str
    """Of the base model."""
    model: nn.Module
    """On the meta device."""
    sizes: dict[str, tuple[int, int]]
    """Full name -> (D, F), in the order of the model's modules."""

    @classmethod
    def of(cls, base: BaseModel) -> BaseLayers:
        """From the base's config alone."""
        model = empty_base(base)
        sizes = {name: linear_sizes(model.get_submodule(name)) for name in adaptable_modules(model)}
        return cls(base.name, model, {name: size for name, size in sizes.items() if size is not None})

    @property
    def activation(self) -> str:
        """Of the base's FFN blocks; empty where its config does not tell."""
        keys = ("hidden_act", "hidden_activation", "activation_function")  # of most; of Gemma; of GPT-2
        return next((str(v) for v in (getattr(self.model.config, k, None) for k in keys) if v), "")

    @property
    def width(self) -> int:
        """D of the hidden states."""
        return int(getattr(self.model.config, "hidden_size", 0))  # 0 fits no tensor, which is then told

    def resolve(self, names: Mapping[str, str], tensors: Mapping[str, Tensor], source: str) -> dict[str, str]:
        """Which of the base's linear layers foreign modules are.

        Args:
            names: Foreign module as the tensors' names begin -> the same without its program's prefix.
            tensors: Of the folder, to see that the modules are of the base's sizes too.
            source: The folder, for errors.

        Returns:
            Foreign module -> ours.

        Raises:
            ConfigError: One line: these are modules of another model, or take no adapter here.
        """
        by_tail: dict[str, str | None] = {}
        for name in self.sizes:
            tail = tail_of(name)
            by_tail[tail] = None if tail in by_tail else name  # an encoder's layer 0 beside a decoder's
        found = {n: bare if bare in self.sizes else by_tail.get(tail_of(bare)) for n, bare in names.items()}
        known = {name: ours for name, ours in found.items() if ours is not None}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise self._of_another(source, f"{len(unknown)} of {len(names)} modules that it has not", unknown)
        others = self._of_other_sizes(known, tensors)
        if 2 * len(others) > len(known):  # fewer are mistakes, and will be told one by one
            raise self._of_another(source, f"{len(others)} of {len(names)} modules of other sizes", others)
        return known

    def children(self, parents: Collection[str], leaves: Collection[str] | None = None) -> list[str]:
        """Linears of decoder layers that stand directly in a module so named, of these own names or any."""
        chosen = []
        for name in self.sizes:
            parts = name.split(".")
            if len(parts) > 2 and parts[-2] in parents and (leaves is None or parts[-1] in leaves):
                chosen.append(name)
        return chosen

    def patterns(self, modules: Collection[str]) -> tuple[str, ...]:
        """Regular expressions that match these linear layers' full names and no other's."""
        if not modules:
            return ()
        leaves = {name.rpartition(".")[2] for name in modules}
        if set(modules) == {name for name in self.sizes if name.rpartition(".")[2] in leaves}:
            return (rf".*\.({'|'.join(sorted(leaves))})",)  # short: people will read it in the folder's JSON
        # One pattern for each kind of module, which lists the layers that have it adapted.
        numbers: dict[tuple[str, str], list[str]] = {}
        for name in (name for name in self.sizes if name in modules):
            found = re.fullmatch(r"(.*?\.)(\d+)(\..+)", name)
            before, number, after = found.groups() if found else (name, "", "")
            numbers.setdefault((re.escape(before), re.escape(after)), []).append(number)
        return tuple(f"{before}({'|'.join(n)}){after}" for (before, after), n in numbers.items())

    def _of_other_sizes(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
        """Modules whose A (rank, D) or B (F, rank) do not fit on them, whatever their rank."""
        others = []
        for name, tensor in tensors.items():
            found = _SIDE.fullmatch(name)
            if found is None or found["module"] not in names or tensor.dim() != 2:
                continue
            in_features, out_features = self.sizes[names[found["module"]]]
            fits = tensor.shape[1] == in_features if found["side"] == "A" else tensor.shape[0] == out_features
            if not fits:
                others.append(found["module"])
        return list(dict.fromkeys(others))

    def _of_another(self, source: str, finding: str, modules: Sequence[str]) -> ConfigError:
        examples = ", ".join(modules[:NUM_EXAMPLES]) + (", ..." if len(modules) > NUM_EXAMPLES else "")
        rule = f"must be an adapter of the linear layers of {self.name}, without its output head"
        fix = "Name the model that it was trained on with --base."
        return ConfigError("import", [Problem(source, rule, f"{finding}: {examples}", fix)])


def tail_of(name: str) -> str:
    """The name from its first number on; the whole name where it has none."""
    number = re.search(r"(?:^|\.)(\d+\..+)", name)
    return name if number is None else number[1]
