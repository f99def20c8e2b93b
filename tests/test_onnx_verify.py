"""`ffebm export` as a real process, and the verification that it does."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import onnx
import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import verify
from ffebm_compiler.onnx.verify import TOLERANCE

FFEBM = Path(sys.executable).with_name("ffebm")
CNN = ["ffebm_compiler.demo.models:DigitsCNN", "--input", "2x1x8x8"]


def export(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FFEBM), "export", *CNN, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


@pytest.mark.parametrize("out", ["parts", "all.onnx"])
def test_export_verifies_what_it_wrote(tmp_path: Path, out: str) -> None:
    result = export(tmp_path, "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert re.fullmatch(rf"wrote .*, in eval mode, to {out}", first)
    found = re.fullmatch(
        r"verified in onnxruntime at batch 2 and 5: largest relative deviation (\S+) \(tolerance 1.0e-04\)", second
    )
    assert found is not None
    assert 0 < float(found[1]) < 1e-5


def test_a_deviation_above_the_tolerance_is_an_error_in_one_line(tmp_path: Path) -> None:
    result = export(tmp_path, "--out", "all.onnx", "--tolerance", "1e-12")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: all.onnx was written, but deviates from the hybrid by \S+ in onnxruntime at batch [25] \(relative, "
        r"with a tolerance of 1.0e-12\): raise the tolerance .*\n",
        result.stderr,
    )
    assert (tmp_path / "all.onnx").is_file()


def test_a_terminal_gets_a_bar_and_no_verify_leaves_it_out(tmp_path: Path) -> None:
    result = export(tmp_path, "--out", "parts", "--no-verify", FORCE_COLOR="1")
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    assert "verified" not in result.stdout
    plain = re.sub(r"\x1b\[[0-9;?]*\w", "", result.stderr)
    assert "━" in plain
    assert re.search(r"0/\d+", plain)
    assert "tracing" in plain


@pytest.mark.parametrize("name", ["cnn", "transformer"])
@pytest.mark.parametrize("parts", [None, "digital"])
def test_two_batch_sizes_are_compared(tmp_path: Path, name: str, parts: str | None) -> None:
    model, x = networks.digits_cnn() if name == "cnn" else networks.transformer(0.1)
    hybrid = ffebm.convert(model, x)
    path = hybrid.export_onnx(tmp_path / "out", parts=parts)
    stages: list[str] = []
    found = verify(hybrid, path, (x,), progress=stages.append)
    assert list(found) == [len(x), len(x) + 3]
    assert stages == [f"verifying batch {size}" for size in found]
    assert max(found.values()) <= 1e-5 < TOLERANCE


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    model, x = networks.mlp()
    hybrid = ffebm.convert(model, x)
    path = hybrid.export_onnx(tmp_path / "all.onnx")
    with torch.no_grad():
        next(hybrid.parameters()).add_(0.01)
    with pytest.raises(ffebm.ExportError, match=r"all.onnx was written, but deviates from the hybrid by"):
        verify(hybrid, path, (x,))


def test_values_that_are_no_numbers_are_noticed(tmp_path: Path) -> None:
    model, x = networks.mlp()
    hybrid = ffebm.convert(model, x)
    path = hybrid.export_onnx(tmp_path / "all.onnx")
    proto = onnx.load(path)
    proto.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(
            float("nan") * onnx.numpy_helper.to_array(proto.graph.initializer[0]), proto.graph.initializer[0].name
        )
    )
    onnx.save(proto, path)
    with pytest.raises(ffebm.ExportError, match=r"gives other values than numbers in onnxruntime at batch"):
        verify(hybrid, path, (x,))


def test_inputs_by_name_integers_and_a_fixed_batch(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.last = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
            return self.last(self.embedding(tokens)) * scale

    tokens, scale = torch.tensor([[9, 1], [3, 0]]), networks.noise(2, 2, 1)
    given = {"scale": scale, "tokens": tokens}
    hybrid = ffebm.convert(networks.seeded(Masked), (), given)
    assert list(verify(hybrid, hybrid.export_onnx(tmp_path / "a.onnx"), (), given)) == [2, 5]
    fixed = ffebm.convert(networks.seeded(Masked), (tokens, scale), dynamic_shapes=None)
    assert list(verify(fixed, fixed.export_onnx(tmp_path / "b", parts="digital"), (tokens, scale))) == [2]


class Ends(nn.Module):
    """A layer, and a function of what it computes."""

    def __init__(self, end: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.end, self.layer = end, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.layer(x), x)


def ends(end: Callable[[Tensor, Tensor], Any]) -> tuple[ffebm.HybridModel, Tensor]:
    x = networks.noise(3, 4)
    return ffebm.convert(networks.seeded(lambda: Ends(end)), x).eval(), x


@pytest.mark.parametrize("parts", [None, "digital"])
def test_integer_outputs_count_beside_floating_ones(tmp_path: Path, parts: str | None) -> None:
    hybrid, x = ends(lambda y, x: (2 * x, y.argmax(1)))
    path = hybrid.export_onnx(tmp_path / "out", parts=parts)
    assert max(verify(hybrid, path, x).values()) < 1e-5
    with torch.no_grad():
        dict(hybrid.named_parameters())["layer.bias"][0] += 100  # which changes the labels alone
    with pytest.raises(
        ffebm.ExportError, match=r"deviates from the hybrid by (6.7e-01|8.3e-01|1.0e\+00) in onnxruntime"
    ):
        verify(hybrid, path, x)


@pytest.mark.parametrize("parts", [None, "digital"])
def test_infinite_values_and_nan_of_both_are_no_deviation(tmp_path: Path, parts: str | None) -> None:
    hybrid, x = ends(lambda y, x: (y.masked_fill(x < 0, -math.inf), torch.full_like(y, math.nan)))
    assert max(verify(hybrid, hybrid.export_onnx(tmp_path / "out", parts=parts), (x,)).values()) < 1e-5


@pytest.mark.parametrize("parts", [None, "digital"])
@pytest.mark.parametrize(
    "end", [lambda y, x: y + torch.rand_like(y), lambda y, x: nn.functional.dropout(y, 0.5, True)], ids=["rand", "drop"]
)
def test_a_network_that_draws_cannot_be_verified(
    tmp_path: Path, parts: str | None, end: Callable[[Tensor, Tensor], Any]
) -> None:
    hybrid, x = ends(end)
    path = hybrid.export_onnx(tmp_path / "out", parts=parts)
    with pytest.raises(
        ffebm.ExportError, match=r"draws random numbers in eval mode \((rand_like|bernoulli)\), of which"
    ):
        verify(hybrid, path, (x,))


@pytest.mark.parametrize("parts", [None, "digital"])
def test_an_export_of_another_model_is_named_as_such(tmp_path: Path, parts: str | None) -> None:
    hybrid, x = ends(lambda y, x: y)
    path = hybrid.export_onnx(tmp_path / "out", parts=parts)
    more, _ = ends(lambda y, x: (y, y.sum()))
    with pytest.raises(
        ffebm.ExportError, match=r"returns float32 \(3, 4\), and the hybrid returns .*, float32 \(\)\. V"
    ):
        verify(more, path, (x,))
    wider = networks.noise(3, 5)
    other = ffebm.convert(nn.Linear(5, 4), wider).eval()
    with pytest.raises(
        ffebm.ExportError, match=r"no export of this hybrid: it takes \w+ \(batch, 4\), and the hybrid ta"
    ):
        verify(other, path, (wider,))


@pytest.mark.parametrize("parts", [None, "digital"])
@pytest.mark.parametrize(
    ("end", "name"),
    [
        (lambda y, x: (y, torch.fft.fft(y)), "the network's output 1"),
        (lambda y, x: (y, 1j * x), "the network's output 1"),
    ],
)
def test_complex_outputs_are_refused(
    tmp_path: Path, parts: str | None, end: Callable[[Tensor, Tensor], Any], name: str
) -> None:
    hybrid, _ = ends(end)
    with pytest.raises(ffebm.ExportError, match=rf"{name} is complex64, and an exported file takes and returns real n"):
        hybrid.export_onnx(tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts", [None, "digital"])
def test_complex_values_inside_are_exported(tmp_path: Path, parts: str | None) -> None:
    hybrid, x = ends(lambda y, x: torch.view_as_real(torch.fft.fft(y)))
    assert max(verify(hybrid, hybrid.export_onnx(tmp_path / "out", parts=parts), (x,)).values()) < 1e-5


def test_complex_inputs_are_refused(tmp_path: Path) -> None:
    class Real(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, z: Tensor) -> Tensor:
            return self.layer(z.real)

    hybrid = ffebm.convert(Real(), torch.complex(networks.noise(3, 4), networks.noise(3, 4)))
    with pytest.raises(ffebm.ExportError, match=r"the network's input 'z' is complex64, and"):
        hybrid.export_onnx(tmp_path / "out.onnx")


def test_an_operator_that_onnxruntime_has_not_in_float64(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.AvgPool1d(2), nn.Linear(4, 3)).double()
    x = torch.randn(2, 3, 6).double()
    hybrid = ffebm.convert(model, x)
    path = hybrid.export_onnx(tmp_path / "hybrid.onnx")
    with pytest.raises(ffebm.ExportError, match=r"no operator that hybrid.onnx needs for its dtype .*hybrid.float\(\)"):
        verify(hybrid, path, (x,))
    path = hybrid.float().export_onnx(tmp_path / "hybrid.onnx")
    assert max(verify(hybrid, path, (x.float(),)).values()) < 1e-5
