"""`benchmarks/first_picture.py` takes commands and words from the real README.md, and fails where they do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import first_picture
from first_picture import Failed, Shell, check, guide

from ffebm_compiler.cli.main import main as ffebm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_commands_are_those_of_the_readme() -> None:
    steps = guide(README)
    assert [command.split()[0] for command in steps.before] == ["python3", "pip"]
    assert steps.draw.startswith("ffebm draw mine:model ")
    (public,) = steps.after
    for command in (*steps.before, steps.draw, public):
        (line,) = (line for line in README.splitlines() if line.startswith(command))
        assert line.removeprefix(command).lstrip().startswith("#") or line == command
    for command in (steps.draw, public):
        drawn = first_picture.picture(command)
        assert drawn is not None
        assert drawn[0] in first_picture.LAYERS


def test_words_are_counted_down_to_the_command_and_characters_of_all_that_is_typed() -> None:
    top = "one two\n\n```sh\nmake x\n```\nthree\n```sh\na b    # c d\nffebm draw m:n --out o # end"
    steps = guide(f"{top}\ne 'f#g'\n```\nfour")
    assert steps.before == ("a b",)
    assert steps.draw == "ffebm draw m:n --out o"
    assert steps.after == ("e 'f#g'",)
    assert steps.words == len(top.split())
    assert steps.typed("cd x") == len(first_picture.MODEL) + len("cd x\na b\nffebm draw m:n --out o\n")


def test_a_readme_without_a_picture_is_refused() -> None:
    with pytest.raises(Failed, match="no block ```sh with a line that begins with `ffebm draw`"):
        guide("```sh\nmake demo\n```\n")


def test_the_strangers_time_is_within_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_picture.main(["--list"]) == 0
    assert "(at most 5: met)" in capsys.readouterr().out


def test_the_strangers_model_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(first_picture.MODEL, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    draw = guide(README).draw
    with pytest.raises(Failed, match=r"mine\.html is not there"):
        check(draw, tmp_path)
    ffebm(draw.split()[1:], standalone_mode=False)
    check(draw, tmp_path)
    page = tmp_path / "mine.html"
    whole = page.read_text(encoding="utf-8")
    page.write_text(whole.replace('"head"', '"hat"'), encoding="utf-8")
    with pytest.raises(Failed, match="lacks head"):
        check(draw, tmp_path)
    page.write_text(whole[:-20], encoding="utf-8")
    with pytest.raises(Failed, match="lacks its end"):
        check(draw, tmp_path)


def test_a_command_that_fails_ends_the_measurement(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        assert shell.seconds("mkdir a && cd a && export WORD=kept") >= 0
        assert shell.seconds("cat; touch $WORD") >= 0  # it reads no command
        assert (tmp_path / "a" / "kept").exists()
        assert shell.seconds("sleep 0.3") >= 0.3
        with pytest.raises(Failed, match="false: failed"):
            shell.seconds("false")
        with pytest.raises(Failed, match="exit 3: failed"):
            shell.seconds("exit 3")
    finally:
        shell.close()
