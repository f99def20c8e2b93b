"""Build wheel and sdist, and try each in an empty environment in an empty folder: `make wheel`.

    .venv/bin/python tests/check_wheel.py [--pip-args="--extra-index-url ..."] [--python PYTHON]

Of each: the version, `ffebm doctor`, plan, page and a training step of an own model, `python -m ffebm_compiler`.
Of the wheel also the whole demo, with the extra [demo], and a type checker that reads its annotations. Ends with dist/.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
from torch import nn

def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
"""
STEP = """
import torch
import ffebm_compiler as ffebm
from mine import mlp

x, y = torch.randn(8, 64), torch.randint(0, 10, (8,))
hybrid = ffebm.convert(mlp(), x)
torch.nn.functional.cross_entropy(hybrid(x), y).backward()
assert all(p.grad is not None for p in hybrid.parameters())
hybrid.save("saved")
assert torch.equal(ffebm.load("saved", mlp())(x), hybrid(x))
print(ffebm.__file__)
"""
TYPED = """
import torch
import ffebm_compiler as ffebm

hybrid: ffebm.HybridModel = ffebm.convert(torch.nn.Linear(2, 2), torch.ones(1, 2))
plan: int = hybrid.plan
"""


def run(command: Sequence[str | Path], cwd: Path, status: int = 0) -> str:
    """The output of a command that must end with this status, without the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    started = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    words = " ".join(str(part) if Path(part).parent == Path() else Path(part).name for part in command)
    print(f"{time.monotonic() - started:7.1f} s  {words.splitlines()[0][:90]}", flush=True)
    if done.returncode != status:
        sys.exit(f"exit code {done.returncode}, expected {status}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def built(folder: Path) -> list[Path]:
    """Wheel and sdist of the files that git knows: stale ones in the checkout's own build/ would go into the wheel."""
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", ROOT / "dist", "."], source)
    return [max((ROOT / "dist").glob(kind), key=lambda path: path.stat().st_mtime) for kind in ("*.whl", "*.tar.gz")]


def tried(artefact: Path, folder: Path, options: argparse.Namespace) -> None:
    """Install one artefact, and use it."""
    wheel = artefact.suffix == ".whl"
    print(f"\n{artefact.name}")
    work, environment = folder / "work", folder / "environment"
    work.mkdir(parents=True)
    (work / "mine.py").write_text(MODEL, encoding="utf-8")
    run([options.python, "-m", "venv", environment], work)
    python, ffebm = environment / "bin" / "python", environment / "bin" / "ffebm"
    pip = [python, "-m", "pip", "install", "--quiet", *shlex.split(options.pip_args), "-c", ROOT / "constraints.txt"]
    run([*pip, f"{artefact}[demo]" if wheel else artefact, *(["mypy"] if wheel else [])], work)
    assert run([ffebm, "--version"], work).startswith("ffebm-compiler ")
    found = json.loads(run([ffebm, "doctor", "--json"], work))
    assert found["test"]["found"] == "passed"
    assert "1 energy block" in run([ffebm, "plan", "mine:mlp", "--input", "1x64"], work)
    assert "1 energy block" in run([python, "-m", "ffebm_compiler", "plan", "mine:mlp", "-i", "1x64"], work)
    run([ffebm, "draw", "mine:mlp", "--input", "1x64", "--out", "page.html"], work)
    assert "block_1" in (work / "page.html").read_text(encoding="utf-8")
    assert str(environment) in run([python, "-c", STEP], work)
    if wheel:
        (work / "typed.py").write_text(TYPED, encoding="utf-8")
        complaint = run([python, "-m", "mypy", "--follow-imports=silent", "typed.py"], work, status=1)
        assert 'expression has type "Plan"' in complaint, complaint
        run([ffebm, "demo"], work)
    else:
        said = subprocess.run([ffebm, "demo"], cwd=work, capture_output=True, text=True, check=False)
        assert said.returncode == 2, said.stdout
        assert "ffebm-compiler[demo]" in said.stderr, said.stderr


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip-args", default="", help="arguments of pip install, such as another index")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the empty environments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for artefact in built(Path(folder)):
            tried(artefact, Path(folder) / artefact.suffix.strip("."), options)
    print("\nwheel and sdist work in an empty environment")


if __name__ == "__main__":
    main()
