"""The public interface is that of tests/public_api.txt, and what is deprecated still works and warns."""

from __future__ import annotations

import difflib
import importlib
import subprocess
import sys

import public_api
import pytest

import ffebm_compiler as ffebm
from ffebm_compiler.deprecation import Deprecated, deprecated_attribute


def test_the_interface_is_the_one_that_is_promised() -> None:
    kept, now = public_api.FILE.read_text(encoding="utf-8").splitlines(), public_api.text().splitlines()
    change = "\n".join(line for line in difflib.unified_diff(kept, now, "promised", "now", lineterm="", n=0))
    assert kept == now, (
        f"the public interface has changed:\n{change}\n"
        "If it is meant: docs/stability.md says what a change asks for. Then run `python tests/public_api.py`, and "
        "commit tests/public_api.txt with a line in CHANGELOG.md."
    )


def test_the_list_sees_a_changed_default_and_a_lost_method(monkeypatch: pytest.MonkeyPatch) -> None:
    before = public_api.text()
    monkeypatch.setattr(ffebm.Anderson, "__init__", lambda self, rtol=1.0: None)
    monkeypatch.delattr(ffebm.HybridModel, "to_digital")
    after = public_api.text()
    assert "ffebm_compiler.HybridModel.to_digital(self)" in before
    assert "ffebm_compiler.HybridModel.to_digital" not in after
    assert "ffebm_compiler.Anderson(rtol=1.0)" in after


def test_a_deprecated_name_works_and_says_what_to_use() -> None:
    with pytest.warns(ffebm.FFEBMDeprecationWarning, match=r"NotYetError is deprecated since version 1.0 .* in 2.0: "):
        found = ffebm.NotYetError
    assert issubclass(found, ffebm.FFEBMError)
    with pytest.warns(ffebm.FFEBMDeprecationWarning) as caught:
        exec("from ffebm_compiler import NotYetError")
    assert caught[0].filename == "<string>"  # the line that uses it


def test_a_name_that_was_never_there() -> None:
    with pytest.raises(AttributeError, match="module 'ffebm_compiler' has no attribute 'convrt'"):
        importlib.import_module("ffebm_compiler").convrt  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute"):
        deprecated_attribute("package", "other", {"name": Deprecated(1, "1.0", "2.0", "use another.")})


def test_importing_everything_warns_of_nothing() -> None:
    command = [sys.executable, "-P", "-W", "error", "-c", "from ffebm_compiler import *; print(convert)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
