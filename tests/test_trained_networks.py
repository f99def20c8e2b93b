"""The benchmark of trained networks: its numbers, its table, and what it says of packages that are not there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import trained_models
import trained_networks
from trained_models import Job
from trained_sounds import RATE, tones, voices_and_others

ROOT = Path(__file__).parent.parent


def _job() -> Job:
    """Two networks in a row: the first in one block of two layers, the second with a batch norm to fold."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
    second = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for _ in range(20):
        second(torch.randn(30, 6))
    x = torch.randn(50, 6)
    return Job(
        {"first": first.eval(), "second": second.eval()},
        {"first": (x[:4],), "second": (x[:4],)},
        lambda nets: nets["second"](nets["first"](x)),
        lambda scores: f"{int(scores.argmax(1).sum())}",
        trained_models._same_class,
    )


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    made = _job()
    monkeypatch.setattr(trained_networks, "JOBS", {"pair": lambda quick: made})
    return made


@pytest.mark.slow
def test_rows_are_those_of_the_networks_converted_by_hand(job: Job) -> None:
    rows = trained_networks.measure("pair", gains=(0.1, 0.5))
    # `whole` has the blocks of `folded`, so that it is not repeated.
    assert [(row["conversion"], row["gain"]) for row in rows] == [
        ("as is", 0.1),
        ("as is", 0.5),
        ("folded", 0.1),
        ("folded", 0.5),
    ]
    assert [(row["blocks"], row["settling"]) for row in rows] == [(3, 1), (3, 1), (2, 2), (2, 2)]
    with torch.no_grad():
        expected = job.work(job.networks)
        for row in rows:
            hybrids = {
                name: ffebm.convert(
                    net, job.examples[name], feedback=row["gain"], fold_batchnorm=row["conversion"] == "folded"
                ).eval()
                for name, net in job.networks.items()
            }
            found = job.work(hybrids)
            error = float((found - expected).norm() / expected.norm())
            assert row["deviation"] == pytest.approx(error, rel=1e-3)
            assert row["deviation"] > 1e-3
            same = float((found.argmax(1) == expected.argmax(1)).double().mean())
            assert row["agreement"] == f"{100 * same:.1f} % the same"
            assert (row["source"], row["hybrid"]) == (job.says(expected), job.says(found))
            last = [b.module.last for h in hybrids.values() for b in h.blocks if b.module.program.coupled]
            assert row["sweeps"] == max(settled.sweeps for settled in last if settled is not None)
            assert row["warned"] == 0


def test_networks_without_feedback_get_one_row_for_any_loop_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 4)
    single = Job({"net": nn.Linear(4, 3)}, {"net": (x,)}, lambda nets: nets["net"](x), str, lambda a, b: "")
    monkeypatch.setattr(trained_networks, "JOBS", {"single": lambda quick: single})
    (row,) = trained_networks.measure("single")
    assert (row["gain"], row["settling"], row["deviation"]) == (None, 0, 0.0)
    assert trained_networks.cells(row)[4] == "any"
    assert trained_networks.cells(row)[-1] == "–"


def test_a_missing_package_and_a_failure_get_a_line_and_the_others_run(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(quick: bool) -> Job:
        trained_models.package_folder("no_such_trained_package")
        raise AssertionError

    page, out = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{trained_networks.BEGIN}old\n{trained_networks.END}after\n", encoding="utf-8")
    jobs = {"absent": absent, **trained_networks.JOBS}
    monkeypatch.setattr(trained_networks, "JOBS", jobs)
    arguments = ["--quick", "--out", str(out), "--table", str(page)]
    assert trained_networks.main(arguments) == 0
    line = "absent: no_such_trained_package is not installed: `make trained` installs it"
    assert line in capsys.readouterr().out.splitlines()
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["gain"] for row in rows} == {0.1, 0.5}
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{trained_networks.BEGIN}| network |")
    assert text.endswith(f"\n- {line}\n{trained_networks.END}after\n")
    table = [row for row in text.splitlines() if row.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({row.count("|") for row in table}) == 1

    def broken(quick: bool) -> Job:
        raise RuntimeError("no weights")

    monkeypatch.setattr(trained_networks, "JOBS", {"broken": broken, **jobs})
    assert trained_networks.main(["--quick", "--only", "broken"]) == 1
    assert "broken: failed, RuntimeError: no weights" in capsys.readouterr().out.splitlines()


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trained_networks.main(["--only", "resnet*"])
    assert "no network is called resnet*; there are mnist1d, digit-recognizer" in capsys.readouterr().err


@pytest.mark.slow
def test_mnist1d_trains_and_converts() -> None:
    rows = trained_networks.measure("mnist1d", gains=(0.03, 0.5), quick=True)
    small, large = rows
    assert float(small["source"].split()[0]) > 20  # chance is 10 %
    assert (small["blocks"], small["settling"]) == (1, 1)
    assert float(small["agreement"].split()[0]) > 90
    assert 0 < small["deviation"] < 0.05 < large["deviation"]
    assert small["sweeps"] < large["sweeps"]


def test_packages_are_pinned_by_hash_and_as_in_the_constraints() -> None:
    lines = (ROOT / "benchmarks" / "trained.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
    versions = dict(pin.split()[0].split("==") for pin in pins)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    common = [line for line in constraints if line.split("==")[0] in versions]
    assert len(common) == 3
    assert all(line == f"{line.split('==')[0]}=={versions[line.split('==')[0]]}" for line in common)


def test_tones_have_their_pitch() -> None:
    pitches = np.array([125.0, 250.0, 500.0])
    x = tones(pitches)
    assert x.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(x.std(1), torch.ones(3))
    strongest = torch.fft.rfft(x).abs().argmax(1) * RATE / x.shape[1]
    np.testing.assert_array_equal(strongest.numpy(), pitches)


def test_voices_have_harmonics_and_the_others_are_told_apart() -> None:
    sounds, voiced = voices_and_others(1.0)
    assert sounds.shape == (10, RATE)
    assert voiced.tolist() == [True] * 5 + [False] * 5
    # A voice repeats with its pitch, noise does not: the largest autocorrelation at the lags of 60 to 260 Hz.
    frame = sounds[:, 6000:8048].double()
    spectrum = torch.fft.rfft(frame - frame.mean(1, keepdim=True), n=4096).abs().square()
    correlation = torch.fft.irfft(spectrum)
    peak = correlation[:, RATE // 260 : RATE // 60].amax(1) / correlation[:, 0].clamp_min(1e-12)
    assert (peak[:5] > 0.25).all()
    assert peak[5] < 0.15
