"""Keywords and keys in another order than at capture: taken where the order makes no difference, else refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm

P, Q = torch.randn(4, 6), torch.randn(4, 6)


class Net(nn.Module):
    """A layer of each feature."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 6)


class InOrder(Net):
    """Features are read in their order."""

    def forward(self, **features: Tensor) -> Tensor:
        return self.a(torch.cat(list(features.values()), 1))


class ByName(Net):
    """Features are read by their names."""

    def forward(self, **features: Tensor) -> Tensor:
        return self.a(torch.cat([features["p"], features["q"]], 1))


class Keys(Net):
    """A dictionary of features."""

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.a(torch.cat([features["p"], features["q"]], 1))


def test_keywords_in_another_order_are_refused_where_the_forward_reads_their_order() -> None:
    hybrid = ffebm.convert(InOrder(), (), {"p": P, "q": Q})
    hybrid(p=Q, q=P)
    message = r"arguments 'q', 'p' were captured in the order 'p', 'q', and the forward computes something else"
    with pytest.raises(ffebm.InputError, match=message):
        hybrid(q=Q, p=P)


def test_keywords_in_another_order_are_taken_where_the_forward_reads_names() -> None:
    model = ByName()
    hybrid = ffebm.convert(model, (), {"p": P, "q": Q})
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(q=Q, p=P), model(q=Q, p=P))


def test_a_loaded_hybrid_refuses_the_same_order(tmp_path) -> None:
    model = InOrder()
    ffebm.convert(model, (), {"p": P, "q": Q}).save(tmp_path / "saved")
    with pytest.raises(ffebm.InputError, match="pass them in the captured order, or convert again"):
        ffebm.load(tmp_path / "saved", model)(q=Q, p=P)


def test_another_order_of_keys_is_named_as_the_reason() -> None:
    hybrid = ffebm.convert(Keys(), ({"p": P, "q": Q},))
    message = r"has the keys 'q', 'p', and the captured one had them in the order 'p', 'q', which a forward may read"
    with pytest.raises(ffebm.InputError, match=message):
        hybrid({"q": Q, "p": P})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"got None: pass one, or convert again with None in its place"),
        ("text", r"got str: pass one"),
        (0.5, r"got float: make it one by torch\.as_tensor"),
    ],
)
def test_what_stands_where_a_tensor_was_captured_is_named_with_a_way_out(value: object, message: str) -> None:
    hybrid = ffebm.convert(Keys(), ({"p": P, "q": Q},))
    with pytest.raises(ffebm.InputError, match=message):
        hybrid({"p": P, "q": value})
