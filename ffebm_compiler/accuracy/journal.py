"""A file of finished measurements, so that what was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import Malformed, clipped, read_json, typed
from ffebm_compiler.files.whole_files import write_whole

__all__ = ["LARGEST", "Journal", "JournalFile", "digest_of", "is_moderate"]

_SCHEMA = 1
_SECONDS = 1.0
"""The file is written at most so often, and at the end."""
LARGEST = 1e100
"""No measured number is larger, so that sums, squares and ratios of them stay finite."""

Found = Mapping[str, float | str | None]


@dataclass(frozen=True)
class JournalFile:
    """The content of the file."""

    schema: int
    kind: str
    of: Mapping[str, str]
    """What the measurements are of: texts that must be the same when they go on."""
    results: Mapping[str, Mapping[str, float | str | None]]
    """Key of a measurement -> its numbers."""


@dataclass
class Journal:
    """The finished measurements, in memory and in a file, if there is one.

    Raises:
        InputError: the file cannot be read, is of another form, or holds measurements of something else.
    """

    path: str | Path | None
    kind: str
    of: Mapping[str, str]
    results: dict[str, Found] = field(default_factory=dict)
    _written: float = 0.0
    _pending: bool = False

    def __post_init__(self) -> None:
        """Read the file, if there is one."""
        if self.path is None or not Path(self.path).exists():
            return
        remedy = "name another file, or delete it"
        value = read_json(self.path, f"the {self.kind}", InputError, remedy)
        try:
            kept: JournalFile = typed(JournalFile, value)
        except Malformed as error:
            raise InputError(f"{self.path} is no {self.kind} ({clipped(str(error))}): {remedy}") from error
        if (kept.schema, kept.kind) != (_SCHEMA, self.kind):
            raise InputError(
                f"{self.path} holds {clipped(ascii(kept.kind))} of version {kept.schema}; expected {self.kind!r} of "
                f"version {_SCHEMA}: {remedy}"
            )
        for name, mine in self.of.items():
            theirs = kept.of.get(name)
            if theirs != mine:
                raise InputError(
                    f"{self.path} is of another {self.kind}: its {name} is {clipped(ascii(theirs))}, and this one's is "
                    f"{clipped(ascii(mine))}: {remedy}"
                )
        self.results = dict(kept.results)

    def number(self, key: str, name: str = "value") -> float:
        """A number of a measurement.

        Raises:
            InputError: the file holds something else there.
        """
        found = self.results[key].get(name)
        if not is_moderate(found):
            raise InputError(
                f"{self.path} is damaged: {name} of {clipped(ascii(key))} is {clipped(ascii(found))}; expected a "
                f"number of at most {LARGEST:g} in size: delete the file"
            )
        return float(found)

    def put(self, key: str, found: Found) -> None:
        """Keep the numbers of a measurement."""
        self.results[key] = found
        self._pending = True
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, if there is one and something is new."""
        if self.path is None or not self._pending:
            return
        content = asdict(JournalFile(_SCHEMA, self.kind, dict(self.of), self.results))
        write_whole(self.path, json.dumps(content, indent=1) + "\n", failure=f"the {self.kind} cannot be written")
        self._written, self._pending = time.monotonic(), False


def is_moderate(value: object) -> TypeGuard[float]:
    """Whether it is a number of at most `LARGEST` in size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def digest_of(model: nn.Module) -> str:
    """A digest of the model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous()
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
