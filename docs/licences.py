"""Writes docs/licences.md: the packages that ffebm-compiler asks for, and their licences as their metadata say.

    python docs/licences.py

Listed are the dependencies and those of every extra, and what a plain installation pulls in beside them, from the
environment that runs this. Versions are left out, since they change with every lock.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"
OWN = "ffebm-compiler"
SHORT = {
    "Apache Software License": "Apache-2.0",
    "MIT License": "MIT",
    "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "Python Software Foundation License": "PSF-2.0",
}
"""Names of classifiers and of free text -> the usual short name."""


def licence(found: Distribution) -> str:
    """The expression of the metadata, else its classifiers, else the first line of its text."""
    metadata = found.metadata
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [each.rsplit(" :: ", 1)[1] for each in metadata.get_all("Classifier") or [] if "License ::" in each]
    names = [name for name in classifiers if name != "OSI Approved"]
    text = next((line.strip() for line in str(metadata.get("License") or "").splitlines() if line.strip()), "")
    return ", ".join(SHORT.get(name, name) for name in names or [text]) or "not said in the metadata"


def asked() -> dict[str, list[str]]:
    """Name of a package -> who asks for it: the package itself, or its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = {}
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            name = canonicalize_name(Requirement(line).name)
            if name != OWN:
                found.setdefault(name, []).append(f"`[{extra}]`" if extra else "always")
    return found


def pulled(names: list[str]) -> set[str]:
    """What an installation of these pulls in, in this environment, themselves included."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.add(name)
        needed = (Requirement(line) for line in lines)
        waiting += [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def rows() -> dict[str, tuple[str, str]]:
    """Name -> licence, who asks for it; packages that are not installed here are left out."""
    known = asked()
    core = [name for name, who in known.items() if "always" in who]
    who = {**known, **{name: known.get(name, ["through others, always"]) for name in pulled(core)}}
    found = {}
    for name, by in who.items():
        try:
            found[name] = (licence(distribution(name)), ", ".join(by))
        except PackageNotFoundError:
            continue
    return dict(sorted(found.items()))


def page() -> str:
    """The whole page."""
    lines = [
        "# Licences",
        "",
        "ffebm-compiler is under the Apache License 2.0 (`LICENSE`). It contains no code of others. The interactive",
        "pages that it writes hold the layout library dagre in the edition of netron, both under the MIT License, and",
        "say so.",
        "",
        "The packages that it asks for, and their licences as their metadata say, by `python docs/licences.py`.",
        "*Always*: every installation. In brackets: the extra that asks for it. PyPI's torch for Linux also pulls in",
        "NVIDIA's CUDA libraries, under NVIDIA's own terms. That of https://download.pytorch.org/whl/cpu does not.",
        "",
        "| package | licence | asked for by |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {re.sub('[|]', '/', licensed)} | {by} |" for name, (licensed, by) in rows().items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    from ffebm_compiler.files.whole_files import write_whole

    write_whole(PAGE, page())
