"""`feedback_weights=`: parameters beside the source's, how they start and train, and what keeps or shows them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, MLP, Tied, noise, seeded, warmed
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import FeedbackWeights


def _converted(feedback_weights: Any = "free", **options: Any) -> tuple[ffebm.HybridModel, MLP, Tensor]:
    model, x = seeded(lambda: MLP(activation=nn.Tanh)), noise(6, 8)
    return ffebm.convert(model, x, feedback_weights=feedback_weights, **options), model, x


OWN = ("layers.1.weight_feedback", "layers.2.weight_feedback", "layers.3.weight_feedback")


def _trained(hybrid: ffebm.HybridModel, x: Tensor, steps: int = 3, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.Adam(hybrid.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        hybrid(x).square().sum().backward()
        optimizer.step()
    return optimizer


def test_they_are_parameters_beside_the_source_s_and_start_as_copies() -> None:
    hybrid, model, _ = _converted()
    assert set(hybrid.state_dict()) == {*model.state_dict(), *OWN}
    assert {name for name, _ in hybrid.named_parameters()} == {*dict(model.named_parameters()), *OWN}
    assert tuple(hybrid.feedback_names) == OWN
    for name in OWN:
        own, forward = hybrid.get_parameter(name), hybrid.get_parameter(name[: -len("_feedback")])
        assert own.requires_grad
        assert torch.equal(own, forward)
        assert own.data_ptr() != forward.data_ptr()
    assert "layers.1.weight_feedback" not in model.state_dict()


def test_a_random_start_has_the_weights_size_and_its_seed() -> None:
    first = _converted(FeedbackWeights(start="random", seed=3))[0]
    again, other = (
        _converted(FeedbackWeights(start="random", seed=3))[0],
        _converted(FeedbackWeights(start="random"))[0],
    )
    state = torch.random.get_rng_state()
    assert torch.equal(state, torch.random.get_rng_state())
    for name in OWN:
        own, forward = first.get_parameter(name).detach(), first.get_parameter(name[:-9]).detach()
        assert torch.equal(own, again.get_parameter(name))
        assert not torch.equal(own, other.get_parameter(name))
        assert float(own.norm() / forward.norm()) == pytest.approx(1, abs=0.25)
        assert abs(float(torch.nn.functional.cosine_similarity(own.flatten(), forward.flatten(), dim=0))) < 0.4


def test_updates() -> None:
    """Fixed weights stay; free ones have their own gradient; aligned ones the same as the forward weights."""
    fixed, model, x = _converted(FeedbackWeights(update="fixed", start="random"))
    before = {name: fixed.get_parameter(name).clone() for name in OWN}
    _trained(fixed, x)
    for name in OWN:
        assert not fixed.get_parameter(name).requires_grad
        assert torch.equal(fixed.get_parameter(name), before[name])
    assert not torch.equal(fixed.layers[1].weight, model.layers[1].weight)

    free, aligned = _converted()[0], _converted(FeedbackWeights(update="aligned"))[0]
    tied = ffebm.convert(model, x)
    for hybrid in (free, aligned, tied):
        hybrid(x).square().sum().backward()
    for name in OWN:
        forward = name[:-9]
        own, there = free.get_parameter(name).grad, free.get_parameter(forward).grad
        assert own is not None
        assert there is not None
        torch.testing.assert_close(own + there, tied.get_parameter(forward).grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(aligned.get_parameter(name).grad, own + there, rtol=1e-5, atol=1e-6)
        assert torch.equal(aligned.get_parameter(name).grad, aligned.get_parameter(forward).grad)
        assert float(own.norm()) > 0
    _trained(aligned, x)
    for name in OWN:
        assert torch.equal(aligned.get_parameter(name), aligned.get_parameter(name[:-9]))


def test_weight_decay_aligns_and_so_does_the_penalty() -> None:
    def distance(hybrid: ffebm.HybridModel) -> float:
        return sum(float((hybrid.get_parameter(n) - hybrid.get_parameter(n[:-9])).detach().norm()) for n in OWN)

    hybrid, _, x = _converted(FeedbackWeights(update="aligned", start="random"))
    start = distance(hybrid)
    _trained(hybrid, x, 20, torch.optim.SGD(hybrid.parameters(), 1e-2, weight_decay=1.0))
    assert distance(hybrid) == pytest.approx(start * (1 - 1e-2) ** 20, rel=1e-4)

    hybrid, _, x = _converted(FeedbackWeights(start="random"))
    penalty = ffebm.alignment_penalty(hybrid)
    pairs = [(hybrid.get_parameter(name), hybrid.get_parameter(name[:-9])) for name in OWN]
    torch.testing.assert_close(penalty, sum(0.5 * (a - b).square().sum() for a, b in pairs))
    penalty.backward()
    for own, forward in pairs:
        torch.testing.assert_close(own.grad, (own - forward).detach())
        torch.testing.assert_close(forward.grad, (forward - own).detach())
    tied = ffebm.convert(seeded(MLP), x)
    assert float(ffebm.alignment_penalty(tied)) == 0
    with pytest.raises(ffebm.InputError, match=r"a hybrid is expected, .* got a MLP"):
        ffebm.alignment_penalty(seeded(MLP))  # type: ignore[arg-type]


# -- state -------------------------------------------------------------------------------------


def test_a_source_s_state_dict_loads_without_them() -> None:
    hybrid, _, x = _converted(FeedbackWeights(start="random"))
    before = {name: hybrid.get_parameter(name).clone() for name in OWN}
    other = seeded(lambda: MLP(activation=nn.Tanh), 7)
    hybrid.load_state_dict(other.state_dict())
    for name in OWN:
        assert torch.equal(hybrid.get_parameter(name), before[name])
    assert torch.equal(hybrid.layers[1].weight, other.layers[1].weight)
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.1, rel=1e-6)
    holder = nn.ModuleDict({"hybrid": hybrid})
    holder.load_state_dict({f"hybrid.{name}": value for name, value in other.state_dict().items()})
    partial = hybrid.state_dict()
    del partial[OWN[0]]
    with pytest.raises(RuntimeError, match=r"layers\.1\.weight_feedback"):
        hybrid.load_state_dict(partial)
    assert hybrid(x).isfinite().all()


def test_state_dicts_of_tied_feedback_and_of_its_own() -> None:
    hybrid, model, x = _converted(FeedbackWeights(start="random"))
    tied = ffebm.convert(model, x, feedback=0.3)
    hybrid.load_state_dict(tied.state_dict())  # with the state of the blocks, which is of other edges
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.1, rel=1e-6)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        tied.load_state_dict(hybrid.state_dict())
    tied.load_state_dict(hybrid.state_dict(), strict=False)
    assert tied.blocks[0].loop_gain == pytest.approx(0.3, rel=1e-6)


class _OwnLoading(MLP):
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict(state_dict, *args, **kwargs)


def test_a_source_with_loading_of_its_own() -> None:
    model = seeded(lambda: _OwnLoading(activation=nn.Tanh))
    hybrid = ffebm.convert(model, noise(6, 8), feedback_weights="free")
    hybrid.load_state_dict(model.state_dict())
    hybrid.load_state_dict(hybrid.state_dict())


def test_state_dicts_copies_and_files_keep_them(tmp_path: Path) -> None:
    hybrid, model, x = _converted(FeedbackWeights(update="aligned", start="random"))
    optimizer = _trained(hybrid, x)
    kept, moments = copy.deepcopy(hybrid.state_dict()), copy.deepcopy(optimizer.state_dict())
    hybrid.save(tmp_path / "saved")
    twins = {"deepcopy": copy.deepcopy(hybrid), "file": ffebm.load(tmp_path / "saved", model)}
    fresh = _converted(FeedbackWeights(update="aligned"))[0]
    torch.save(kept, tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twins["state_dict"] = fresh.train()
    _trained(hybrid, x, 2, optimizer)
    for name, twin in twins.items():
        assert twin.feedback_weights == FeedbackWeights(
            update="aligned", start="tied" if name == "state_dict" else "random"
        )
        assert tuple(twin.feedback_names) == OWN
        resumed = torch.optim.Adam(twin.parameters(), 1e-2)
        resumed.load_state_dict(copy.deepcopy(moments))
        _trained(twin, x, 2, resumed)
        for key, value in hybrid.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key]), (name, key)
        assert twin.blocks[0].module.scales == hybrid.blocks[0].module.scales


def test_fixed_ones_stay_fixed_through_a_file(tmp_path: Path) -> None:
    hybrid, model, _ = _converted(FeedbackWeights(update="fixed", start="random", seed=5))
    hybrid.save(tmp_path / "saved")
    loaded = ffebm.load(tmp_path / "saved", model)
    assert loaded.feedback_weights == hybrid.feedback_weights
    assert not loaded.get_parameter(OWN[0]).requires_grad
    settings = tmp_path / "saved" / "hybrid.json"
    found = json.loads(settings.read_text(encoding="utf-8"))
    found["feedback_weights"]["update"] = "often"
    settings.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ffebm.InputError, match=r"feedback_weights\.update"):
        ffebm.load(tmp_path / "saved", model)


def test_a_digital_model_is_the_source_s() -> None:
    hybrid, model, x = _converted()
    _trained(hybrid, x)
    digital = hybrid.to_digital()
    assert set(digital.state_dict()) == set(model.state_dict())
    with hybrid.feedforward_mode():
        torch.testing.assert_close(digital(x), hybrid(x))
    assert set(hybrid.state_dict()) == {*model.state_dict(), *OWN}  # and stays itself


def test_another_dtype() -> None:
    hybrid, _, x = _converted(FeedbackWeights(start="random"))
    expected = hybrid(x)
    torch.testing.assert_close(hybrid.double()(x.double()).float(), expected, rtol=1e-3, atol=1e-4)
    assert hybrid.get_parameter(OWN[0]).dtype is torch.float64


def test_a_source_that_names_a_dtype_is_captured_again_without_them() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            s = torch.tanh(self.b(torch.tanh(self.a(x))))
            return self.c(s.softmax(-1).to(self.c.weight.dtype))

    hybrid = ffebm.convert(seeded(Cast), noise(2, 6), feedback_weights=FeedbackWeights(start="random"))
    expected = hybrid(noise(2, 6))
    found = hybrid.double()(noise(2, 6).double())
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


# -- weights that are no plain parameters ------------------------------------------------------


def test_a_weight_on_several_edges_has_one() -> None:
    hybrid = ffebm.convert(seeded(lambda: Tied(nn.Tanh)), noise(5, 6), feedback_weights="free")
    assert set(hybrid.feedback_names) == {"shared.weight_feedback", "head.weight_feedback"}
    hybrid(noise(5, 6)).sum().backward()
    assert all(hybrid.get_parameter(name).grad is not None for name in hybrid.feedback_names)


def test_a_folded_weight_has_one_of_the_folded_weight() -> None:
    x = noise(4, 3, 8, 8)
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5))
    )
    model = warmed(model, x)
    hybrid = ffebm.convert(model, x, fold_batchnorm=True, feedback_weights="free")
    assert tuple(hybrid.feedback_names) == ("3.weight_feedback",)
    norm = model[4]
    folded = model[3].weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    torch.testing.assert_close(hybrid.get_parameter("3.weight_feedback"), folded)
    torch.testing.assert_close(hybrid(x), ffebm.convert(model, x, fold_batchnorm=True)(x))


def test_names_that_are_taken() -> None:
    class Taken(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
            self[2].register_buffer("weight_feedback", torch.zeros(1))

    hybrid = ffebm.convert(seeded(Taken), noise(2, 4), feedback_weights="free")
    assert tuple(hybrid.feedback_names) == ("2.weight_feedback_2",)


def test_a_network_without_feedback_has_none() -> None:
    hybrid = ffebm.convert(nn.Sequential(nn.Linear(4, 4)), noise(2, 4), feedback_weights="free")
    assert dict(hybrid.feedback_names) == {}
    assert float(ffebm.alignment_penalty(hybrid)) == 0


# -- exports and pictures ----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "convolutions"])
def test_exports(case: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from ffebm_compiler.onnx.execute import run

    model, x = CASES[case].make(nn.Tanh)
    own, tight = FeedbackWeights(start="random"), ffebm.GaussSeidel(rtol=1e-6)
    hybrid = ffebm.convert(model, x, feedback_weights=own, feedback=0.6, solver=tight, **CASES[case].options).eval()
    expected = hybrid(x).detach()
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "hybrid.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    hybrid.export_onnx(tmp_path / "out", parts="digital")
    (again,) = run(tmp_path / "out", x)
    assert float((again - expected).norm() / expected.norm()) <= 1e-5
    tied = ffebm.convert(model, x, feedback=0.6, **CASES[case].options).eval()
    assert float((tied(x).detach() - expected).norm() / expected.norm()) > 1e-3  # random feedback is another network


def test_pictures_say_so(tmp_path: Path) -> None:
    hybrid, _, x = _converted()
    words = "feedback through 3 weights of its own"
    hybrid.save_svg(tmp_path / "own.svg")
    assert words in (tmp_path / "own.svg").read_text(encoding="utf-8")
    assert words in hybrid.to_dot()
    assert words not in hybrid.plan.to_dot()
    hybrid.save_image(tmp_path / "own.png")
    hybrid.save_html(tmp_path / "own.html", diagnosis=hybrid.diagnose(x))
    page = (tmp_path / "own.html").read_text(encoding="utf-8")
    assert "of a vector field: its feedback has weights of its own, so that there is no energy" in page
    from ffebm_compiler.drawing import plot_relaxation

    title = plot_relaxation(hybrid.diagnose(x)).axes[1].get_title()
    assert title == "no energy: block_1 (feedback through weights of its own)"


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"update": "sometimes"}, "update is 'sometimes'; expected 'free', 'fixed' or 'aligned'"),
        ({"start": "zero"}, "start is 'zero'; expected 'tied' or 'random'"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
    ],
)
def test_settings_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        FeedbackWeights(**options)


def test_the_argument_is_checked() -> None:
    with pytest.raises(ffebm.InputError, match="feedback_weights is 'loose'; expected 'tied', 'free' or a Feedback"):
        _converted("loose")


def test_weights_of_the_wrong_shape_are_refused() -> None:
    hybrid, _, x = _converted()
    state = hybrid.state_dict()
    state[OWN[0]] = state[OWN[0]].t()
    with pytest.raises(
        ffebm.InputError, match=r"'layers.1.weight_feedback' in the state dict have the shape \(12, 10\)"
    ):
        hybrid.load_state_dict(state)
    hybrid.get_submodule("layers.1").weight_feedback = nn.Parameter(torch.zeros(12, 10))
    with pytest.raises(
        ffebm.InputError, match=r"block_1: feedback weights of shape \(12, 10\) go with forward weights of"
    ):
        hybrid(x)
