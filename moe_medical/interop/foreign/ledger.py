"""Foreign tensors, each of which must be asked for: what is missing, misshaped or left over is a mistake."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_medical.errors import ConfigError, Problem


@dataclass
class Ledger:
    """Accounts for every tensor of a folder.

    Args:
        source: The folder, for errors.
        tensors: By their foreign names.
    """

    source: str
    tensors: Mapping[str, Tensor]
    dropped: list[str] = field(default_factory=list)
    """Names of tensors that the foreign program itself never uses."""
    _used: set[str] = field(default_factory=set)
    _problems: list[Problem] = field(default_factory=list)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32; zeros where it is missing or misshaped, and then `refuse` will say so."""
        self._used.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            self._problems.append(Problem(name, "is missing"))
        elif tuple(tensor.shape) != shape:
            self._problems.append(Problem(name, f"must have shape {shape}", tuple(tensor.shape)))
        elif not tensor.isfinite().all():
            self._problems.append(Problem(name, "must be finite"))
        else:
            return tensor.to(torch.float32)
        return torch.zeros(()).expand(shape)

    def take_copy(self, name: str, original: str) -> None:
        """Account for a second name of the same numbers, where the folder has one."""
        if name not in self.tensors:
            return
        self._used.add(name)
        first = self.tensors.get(original)
        if first is None or not torch.equal(first, self.tensors[name]):
            self._problems.append(Problem(name, f"must equal {original}"))

    def drop(self, names: Iterable[str]) -> None:
        """Account for tensors that their own program never uses."""
        self.dropped += names
        self._used.update(self.dropped)

    def complain(self, problem: Problem) -> None:
        """Add a mistake that `refuse` will tell of."""
        self._problems.append(problem)

    def refuse(self) -> None:
        """Raise if anything is wrong.

        Raises:
            ConfigError: All that is missing, misshaped and unexpected.
        """
        if not self._used:
            self.complain(Problem(self.source, "must hold an adapter's tensors"))
        left = [Problem(name, "is not expected") for name in self.tensors if name not in self._used]
        if problems := [*self._problems, *left]:
            raise ConfigError(self.source, sorted(problems, key=lambda problem: problem.path))
