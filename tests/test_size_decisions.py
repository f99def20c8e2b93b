"""What a forward decides by a free size: a call that would decide otherwise is refused, any other is the source's."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import ffebm_compiler as ffebm
from ffebm_compiler.errors import InputError

FREE = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
SIDES = (6, 7, 8, 9, 10, 12, 16)
SHAPES = [(batch, 3, 8, 8) for batch in (1, 2, 3, 4, 5, 8)] + [(4, 3, a, b) for a in SIDES for b in SIDES]


class Net(nn.Module):
    """A layer, a decision by the sizes of its result, and another layer."""

    def __init__(self, decide: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(torch.relu(self.decide(self, h)).mean((2, 3)))


def in_turn(pieces: tuple[Tensor, ...], dim: int) -> Tensor:
    return torch.cat([(index + 1) * piece for index, piece in enumerate(pieces)], dim)


def of_one_sample(net: Net, h: Tensor) -> Tensor:
    flat = net.second(h).mean((2, 3)).squeeze()
    return (h * 2 if flat.dim() == 1 else h) + flat.sum()


def in_rounds(net: Net, h: Tensor) -> Tensor:
    total = h
    for index in range(h.shape[0] // 2):
        total = total + h.roll(index, 0)
    return total


DECISIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "an even batch": lambda net, h: 2 * h if h.shape[0] % 2 == 0 else h,
    "a batch of one": lambda net, h: 2 * h if h.shape[0] == 1 else h,
    "a loop over half the batch": in_rounds,
    "a root of the batch": lambda net, h: h * math.sqrt(h.shape[0] / 2),
    "a squeezed batch": of_one_sample,
    "pieces of two samples": lambda net, h: in_turn(h.split(2), 0),
    "three pieces of a batch": lambda net, h: in_turn(torch.chunk(h, 3), 0),
    "pieces of a width": lambda net, h: in_turn(h.split(3, -1), -1),
    "a whole part": lambda net, h: h * int(h.shape[0] * 0.5),
    "a list of sizes": lambda net, h: 2 * h if h.shape[0] in (2, 4) else h,
    "an even width": lambda net, h: 2 * h if h.shape[-1] % 2 == 0 else h,
    "a square": lambda net, h: 2 * h if h.shape[-1] == h.shape[-2] else h,
    "an area": lambda net, h: 2 * h if h.shape[-1] * h.shape[-2] < 80 else h,
    "a wide one": lambda net, h: 2 * h if h.shape[-1] > 7 else h,
    "the kernel of a pool": lambda net, h: F.max_pool2d(h, h.shape[-1] // 4),
    "the kernel of an average": lambda net, h: F.avg_pool2d(net.second(h), h.shape[-2] // 3),
}
BY_THE_BATCH = (
    "an even batch",
    "a batch of one",
    "a loop over half the batch",
    "a whole part",
    "pieces of two samples",
    "three pieces of a batch",
    "a squeezed batch",
)
"""Those that the default frees."""


def made(name: str) -> tuple[Net, Tensor]:
    return networks.seeded(lambda: Net(DECISIONS[name])).eval(), torch.randn(4, 3, 8, 8)


def calls(hybrid: ffebm.HybridModel, model: nn.Module, shapes: list[tuple[int, ...]]) -> tuple[int, list[str]]:
    """How many calls gave the source's values, and the texts of those that were refused."""
    right, refused = 0, []
    for shape in shapes:
        x = torch.randn(shape)
        try:
            found = hybrid(x)
        except InputError as error:
            refused.append(str(error))
            continue
        torch.testing.assert_close(found, model(x))
        right += 1
    return right, refused


@pytest.mark.parametrize("name", DECISIONS)
def test_a_call_is_the_sources_or_is_refused(name: str) -> None:
    model, x = made(name)
    hybrid = ffebm.convert(model, x, dynamic_shapes=FREE, hardware=ffebm.Hardware(layers_per_block=1))
    right, refused = calls(hybrid, model, SHAPES)
    assert right
    assert refused
    # Where the exporter itself has made a size a number, the input's shape is refused as any other.
    assert all("does something else than for the example" in text or "expected (4, 3" in text for text in refused)


@pytest.mark.parametrize("name", BY_THE_BATCH)
def test_the_batch_size_is_free_by_default(name: str) -> None:
    model, x = made(name)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    right, refused = calls(hybrid, model, SHAPES[:6])
    assert right >= 2  # 4, and 2 or 5
    assert refused
    assert all(f"({__file__}, line " in text for text in refused)


def test_the_refusal_says_which_expression_was_what_and_where() -> None:
    model, x = made("an even batch")
    hybrid = ffebm.convert(model, x)
    with pytest.raises(
        InputError,
        match=r"the inputs have shapes \(3, 3, 8, 8\), for which the forward does something else than for the example: "
        r"there \(x\.shape\[0\] % 2\) == 0 is True \(.*test_size_decisions\.py, line \d+\)\. Convert again",
    ):
        hybrid(torch.randn(3, 3, 8, 8))
    (note,) = [note for note in hybrid.plan.notes if "decides by a size" in note]
    assert "(x.shape[0] % 2) == 0 is True" in note
    for copied in (copy.deepcopy(hybrid), pickle.loads(pickle.dumps(ffebm.convert(nn.Sequential(Even()), x)))):
        with pytest.raises(InputError, match="does something else than for the example"):
            copied(torch.randn(3, 3, 8, 8))


class Even(nn.Module):
    """A decision in a module that can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] % 2 == 0 else x


class InTraining(nn.Module):
    """A decision in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.training and x.shape[0] % 2 == 0:
            h = h - h.mean(0)
        return self.second(h)


def test_a_decision_in_train_mode_refuses_nothing_in_eval_mode() -> None:
    model = networks.seeded(InTraining)
    hybrid = ffebm.convert(model, torch.randn(4, 6), hardware=ffebm.Hardware(layers_per_block=1))
    x = torch.randn(3, 6)
    torch.testing.assert_close(hybrid.eval()(x), model.eval()(x))
    with pytest.raises(InputError, match="does something else than for the example"):
        hybrid.train()(x)
    torch.testing.assert_close(hybrid(x[:2]), model.train()(x[:2]))


def test_an_example_of_one_sample_that_decides_by_it_fixes_the_batch() -> None:
    model, _ = made("a batch of one")
    x = torch.randn(1, 3, 8, 8)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    torch.testing.assert_close(hybrid(x), model(x))
    assert any("the batch size is fixed at 1" in note for note in hybrid.plan.notes)
    with pytest.raises(InputError, match=r"expected \(1, 3, 8, 8\)"):
        hybrid(torch.randn(2, 3, 8, 8))


class Positions(nn.Module):
    """Expands one row of positions to the batch, and not for a batch of one, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(5, 6)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(6, 11)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])[None]
        if ids.shape[0] != places.shape[0]:
            places = places.expand(ids.shape[0], -1)
        return self.head(self.drop(self.words(ids) + self.places(places)))


@pytest.mark.parametrize("example", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_one_sample_for_which_the_decision_makes_no_difference_is_accepted(example: int, training: bool) -> None:
    model = networks.seeded(Positions).train(training)
    hybrid = ffebm.convert(model, torch.randint(11, (example, 5)), hardware=ffebm.Hardware(layers_per_block=1))
    assert not any("by a size" in note or "batch size" in note for note in hybrid.plan.notes)
    hybrid.train(training)
    for size in (1, 2, 7):
        ids = torch.randint(11, (size, 5))
        torch.manual_seed(0)
        found = hybrid(ids)
        torch.manual_seed(0)
        torch.testing.assert_close(found, model(ids))


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.transformer(),
        lambda: networks.digits_cnn(),
        lambda: (nn.LSTM(4, 5, batch_first=True), torch.randn(2, 3, 4)),
        lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 3, 8)),
        lambda: (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(2), nn.Upsample(4)), torch.randn(2, 1, 9, 9)),
    ],
    ids=["transformer", "cnn", "lstm", "encoder", "upsample"],
)
def test_torchs_own_questions_are_no_decisions(make: Callable[[], tuple[nn.Module, Any]]) -> None:
    hybrid = ffebm.convert(*make())
    assert hybrid._call_form.decisions == hybrid._call_form.decisions_in_training == ()


def test_a_change_of_layout_is_no_decision() -> None:
    model = networks.seeded(lambda: Net(lambda net, h: h.transpose(1, 2).contiguous().transpose(1, 2))).eval()
    hybrid = ffebm.convert(model, torch.randn(4, 3, 8, 8), dynamic_shapes=FREE)
    assert hybrid._call_form.decisions == ()


def test_an_export_is_verified_at_sizes_that_decide_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from ffebm_compiler.onnx.verify import verify

    model, x = made("an even batch")
    hybrid = ffebm.convert(model, x)
    hybrid.export_onnx(tmp_path / "net.onnx")
    assert set(verify(hybrid, tmp_path / "net.onnx", (x,))) == {4, 8}


@pytest.mark.parametrize(
    "apply",
    [
        lambda net, h: F.conv2d(h, net.second.weight, stride=h.shape[-1] // 4),
        lambda net, h: F.conv2d(h, net.second.weight, padding=h.shape[-1] // 8),
        lambda net, h: F.conv2d(h, net.second.weight, dilation=h.shape[-1] // 8),
        lambda net, h: F.conv_transpose2d(h, net.second.weight, stride=h.shape[-1] // 4),
    ],
    ids=["stride", "padding", "dilation", "transposed"],
)
def test_a_convolution_that_is_set_by_a_size_is_digital(apply: Callable[[Net, Tensor], Tensor]) -> None:
    model = networks.seeded(lambda: Net(apply)).eval()
    hybrid = ffebm.convert(model, torch.randn(4, 3, 8, 8), dynamic_shapes=FREE)
    assert calls(hybrid, model, [(2, 3, 8, 8), (4, 3, 16, 16), (3, 3, 12, 24)]) == (3, [])
    assert "computed from the input's shape" in hybrid.plan.rejected["second"]


@pytest.mark.parametrize(
    "weigh",
    [
        lambda h: torch.stack([part * i for i, part in enumerate(h.unbind(3))], 3),
        lambda h: h * torch.linspace(0, 1, h.shape[3]),
        lambda h: h * int(h.shape[3]),
    ],
    ids=["unbind", "linspace", "int"],
)
def test_a_free_size_that_a_decision_fixes_is_refused_for_that_reason(weigh: Callable[[Tensor], Tensor]) -> None:
    model = networks.seeded(lambda: Net(lambda net, h: weigh(h))).eval()
    hybrid = ffebm.convert(model, torch.randn(4, 3, 8, 8), dynamic_shapes=FREE)
    with pytest.raises(
        InputError, match=r"for which the forward does something else .*x\.shape\[3\] is 8 \("
    ) as caught:
        hybrid(torch.randn(4, 3, 8, 10))
    assert "dynamic_shapes" not in str(caught.value)
