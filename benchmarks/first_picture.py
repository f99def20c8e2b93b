"""How long a stranger takes from a clone to the picture of a model of their own, by the text of README.md.

    python benchmarks/first_picture.py [--torch-first] [--list] [--out PATH]

The commands are those of README.md's first block with `ffebm draw`, as they stand there, after `git clone` and `cd`.
One shell runs them in an empty folder, on a clone of this checkout's last commit, without pip's cache. Each is clocked
by the wall clock. The model is a file that the stranger types. The rest of the block, the picture of a public model, is
clocked too and is in no sum.

The stranger's own time is counted at stated rates: the words of README.md down to the command that draws their model,
200 a minute, and the characters that they type, file and commands, 200 a minute (40 words). The second sum adds all
waits, as if nobody read or typed while a command runs.

`--torch-first` installs torch and its packages before the compiler, and leaves that wait out of the sum: whoever has a
model in PyTorch has torch, and the wait depends on its build and on the network. `--list` runs nothing.

Exit status 1 if a command fails, or if a picture is missing or lacks a layer of its model. Nothing is opened.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

from ffebm_compiler.files.whole_files import write_whole

ROOT = Path(__file__).resolve().parent.parent
WORDS, CHARACTERS = 200, 200
"""Read and typed in a minute."""
LIMIT = 5
"""Minutes that it may take."""
CLONE = "ffebm-compiler"

MODEL = """\
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def model():
    return Net()
"""
LAYERS: Mapping[str, Sequence[str]] = {
    "mine:model": ("conv", "head"),
    "timm:resnet18": ("conv1", "layer4.1.conv2", "fc"),
}
"""Model -> layers that its page must name."""


class Failed(Exception):
    """A command or its picture is not as README.md says."""


@dataclass(frozen=True)
class Guide:
    """What README.md asks of a stranger."""

    before: tuple[str, ...]
    """Commands before the one that draws the stranger's model."""
    draw: str
    after: tuple[str, ...]
    """The rest of the block."""
    words: int
    """From the top of README.md to the end of `draw`."""

    def typed(self, *commands: str) -> int:
        """Characters of commands and of the file with the model; each line has its end."""
        return len(MODEL) + sum(len(command) + 1 for command in (*commands, *self.before, self.draw))


def guide(text: str) -> Guide:
    """The first block of README.md that draws a picture: its first such command draws the stranger's model."""
    for block in re.finditer(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        lines = block[1].splitlines(keepends=True)
        drawing = next((index for index, line in enumerate(lines) if line.startswith("ffebm draw ")), None)
        if drawing is not None:
            commands = [re.split(r"\s+#", line.rstrip(), maxsplit=1)[0] for line in lines]
            end = block.start(1) + sum(map(len, lines[: drawing + 1]))
            rest = tuple(filter(None, commands[drawing + 1 :]))
            return Guide(tuple(commands[:drawing]), commands[drawing], rest, len(text[:end].split()))
    raise Failed("README.md has no block ```sh with a line that begins with `ffebm draw`")


def picture(command: str) -> tuple[str, Path] | None:
    """Which model a line draws, and into which file; None if it draws none."""
    words = shlex.split(command)
    if "draw" not in words:
        return None
    return words[words.index("draw") + 1], Path(words[words.index("--out") + 1])


def check(command: str, folder: Path) -> None:
    """Raise if the picture of a command is not whole."""
    drawn = picture(command)
    if drawn is None:
        return
    model, file = drawn
    if not (folder / file).is_file():
        raise Failed(f"{command}: {file} is not there")
    page = (folder / file).read_text(encoding="utf-8")
    missing = [name for name in LAYERS[model] if f'"{name}"' not in page]
    if not page.rstrip().endswith("</html>") or missing:
        raise Failed(f"{command}: {file} is no whole page, or lacks {', '.join(missing) or 'its end'}")


class Shell:
    """One bash for all commands, so that an environment that is activated stays so."""

    def __init__(self, folder: Path) -> None:
        own = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
        variables = {key: value for key, value in os.environ.items() if key not in own}
        self.bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], cwd=folder, env={**variables, "PIP_NO_CACHE_DIR": "1"}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def seconds(self, command: str) -> float:
        """Wall time of a command."""
        assert self.bash.stdin is not None
        assert self.bash.stdout is not None
        print(f"    {command}", file=sys.stderr, flush=True)
        mark, printed, started = f"status of {time.monotonic_ns()}:", [], time.monotonic()
        self.bash.stdin.write(f"{{ {command}\n}} </dev/null\nprintf '\\n%s %s\\n' '{mark}' $?\n")
        self.bash.stdin.flush()
        for line in self.bash.stdout:
            if line.startswith(mark):
                took = time.monotonic() - started
                if line.split()[-1] != "0":
                    break
                return took
            printed.append(line)
        raise Failed(f"{command}: failed\n{''.join(printed[-20:])}")

    def close(self) -> None:
        """End the shell."""
        self.bash.kill()
        self.bash.communicate()


def row(part: str, what: str, seconds: float, counts: bool = True) -> dict[str, Any]:
    """One line of the table."""
    return {"part": part, "what": what, "seconds": seconds, "counts": counts}


def clone(source: Path) -> tuple[str, str]:
    """The commands that stand in no README: whoever reads it has the address."""
    return f"git clone --quiet {shlex.quote(str(source))} {CLONE}", f"cd {CLONE}"


def counted(steps: Guide, source: Path) -> list[dict[str, Any]]:
    """The stranger's own time."""
    typed = steps.typed(*clone(source))
    return [
        row("own", f"read {steps.words} words, {WORDS} a minute", 60 * steps.words / WORDS),
        row("own", f"type {typed} characters, {CHARACTERS} a minute", 60 * typed / CHARACTERS),
    ]


def clocked(steps: Guide, source: Path, torch_first: bool) -> list[dict[str, Any]]:
    """The waits."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="first-picture-") as name:
        folder = Path(name)
        shell = Shell(folder)
        try:
            rows += [row("wait", command, shell.seconds(command)) for command in clone(source)]
            write_whole(folder / CLONE / "mine.py", MODEL)
            for command in (*steps.before, steps.draw, *steps.after):
                if torch_first and command.startswith("pip install"):
                    torch_first = False
                    rows.append(row("wait", "pip install torch", shell.seconds("pip install torch"), False))
                rows.append(row("wait", command, shell.seconds(command), command not in steps.after))
                check(command, folder / CLONE)
        finally:
            shell.close()
    return rows


def minutes(rows: Sequence[Mapping[str, Any]], *parts: str) -> float:
    """The sum of what counts."""
    return sum(each["seconds"] for each in rows if each["counts"] and each["part"] in parts) / 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-first", action="store_true", help="install torch before, and do not count it")
    parser.add_argument("--list", action="store_true", help="print the commands and the counted time, run nothing")
    add_out(parser)
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    try:
        steps = guide((ROOT / "README.md").read_text(encoding="utf-8"))
        rows = counted(steps, ROOT)
        if options.list:
            print("\n".join((*clone(ROOT), *steps.before, steps.draw, *steps.after)))
        else:
            rows += clocked(steps, ROOT, options.torch_first)
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    print(f"\n| what | seconds | in the sum |\n| --- | ---: | --- |\n{lines(rows)}\n")
    own, whole = minutes(rows, "own"), minutes(rows, "own", "wait")
    print(f"reading and typing: {own:.1f} min (at most {LIMIT}: {'met' if own <= LIMIT else 'missed'})")
    if not options.list:
        print(f"with the waits: {whole:.1f} min (at most {LIMIT}: {'met' if whole <= LIMIT else 'missed'})")
        print(f"load of the machine at the start: {load:.1f}")
        found = {"own_min": own, "whole_min": whole, "load": load, "torch_first": options.torch_first, "rows": rows}
        keep(found, options.out)
    return 0


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as Markdown."""
    return "\n".join(f"| {r['what']} | {r['seconds']:.0f} | {'yes' if r['counts'] else 'no'} |" for r in rows)


if __name__ == "__main__":
    sys.exit(main())
