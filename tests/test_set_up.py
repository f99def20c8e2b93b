"""The user's model and process are as before; state in attributes is refused or told, set-up is done once."""

import copy
import functools
import itertools
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import pytest
import torch
from same_as_source import ONE_LAYER, assert_same, deviation
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import ffebm_compiler as ffebm


@functools.lru_cache
def cached(length: int) -> torch.Tensor:
    """A table that the process keeps."""
    return torch.arange(length, dtype=torch.float32)


TABLES: dict[int, torch.Tensor] = {}


def tabled(length: int) -> torch.Tensor:
    """A table that this module keeps."""
    if length not in TABLES:
        TABLES[length] = torch.arange(length, dtype=torch.float32)
    return TABLES[length]


def remembered():
    """A table that a closure keeps."""
    known: dict[int, torch.Tensor] = {}

    def table(length: int) -> torch.Tensor:
        if length not in known:
            known[length] = torch.arange(length, dtype=torch.float32)
        return known[length]

    return table


class Net(nn.Module):
    """A layer and a forward that keeps something."""

    def __init__(self, form) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.table: torch.Tensor | None = None
        self.tables: dict[str, torch.Tensor] = {}
        self.weights = nn.Parameter(torch.randn(8))
        self.last, self.count = torch.zeros(()), 0
        self.form = form

    def forward(self, x):
        return self.b(torch.tanh(self.form(self, self.a(x))))


def buffer_at_first_call(net, h):
    if not hasattr(net, "steps"):
        net.register_buffer("steps", torch.arange(8.0), persistent=False)
    return h + net.steps


def table_at_first_call(net, h):
    if net.table is None:
        net.table = torch.arange(8.0)
    return h + net.table


def table_of_parameters(net, h):
    if net.table is None:
        net.table = net.weights.square()
    return h + (net.weights.square() if net.training else net.table)


def tables_of_parameters(net, h):
    if "cpu" not in net.tables:
        net.tables["cpu"] = net.weights.square()
    return h + (net.weights.square() if net.training else net.tables["cpu"])


def kept_for_pictures(net, h):
    net.last = h.detach()
    return h


def counted_in_python(net, h):
    net.count += 1
    return h


TABLE = remembered()
FORMS = {
    "buffer at the first call": buffer_at_first_call,
    "table at the first call": table_at_first_call,
    "table of parameters": table_of_parameters,
    "tables of parameters": tables_of_parameters,
    "lru_cache": lambda net, h: h + cached(h.shape[1]),
    "dictionary of the module": lambda net, h: h + tabled(h.shape[1]),
    "dictionary of a closure": lambda net, h: h + TABLE(h.shape[1]),
    "kept for pictures": kept_for_pictures,
    "counted in python": counted_in_python,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_hybrid_is_right_and_the_source_stays_real(form: str) -> None:
    torch.manual_seed(0)
    model, inputs = Net(FORMS[form]), torch.randn(5, 8)
    for train in (True, False):
        hybrid = assert_same(Net(FORMS[form]), inputs, train=train)
    ffebm.convert(model, inputs)
    assert not isinstance(model(inputs), FakeTensor)
    assert model.table is None or not isinstance(model.table, FakeTensor)
    noted = any("sets attributes" in note for note in hybrid.plan.notes)
    assert noted == (form in ("kept for pictures", "counted in python"))
    assert not noted or any("'last'" in note or "'count'" in note for note in hybrid.plan.notes)


@pytest.mark.parametrize("form", ["lru_cache", "dictionary of the module"])
def test_a_cache_filled_while_tracing_holds_no_fake_tensor(form: str) -> None:
    def refused(net, h):
        FORMS[form](net, h)
        cached(3 if torch.compiler.is_exporting() else 2)
        tabled(3 if torch.compiler.is_exporting() else 2)
        return h[: int(h.sum())]

    with pytest.raises(ffebm.FFEBMError):
        ffebm.convert(Net(refused), torch.randn(5, 8))
    assert not isinstance(cached(3), FakeTensor)
    assert not isinstance(tabled(3), FakeTensor)


def test_a_table_of_parameters_follows_them() -> None:
    model, inputs = Net(table_of_parameters), torch.randn(5, 8)
    hybrid = ffebm.convert(model, inputs, hardware=ONE_LAYER).eval()
    before = hybrid(inputs)
    with torch.no_grad():
        hybrid.get_parameter("weights").mul_(2)
        model.weights.mul_(2)
    assert deviation(hybrid(inputs), before) > 1e-3
    assert deviation(hybrid(inputs), model.eval()(inputs)) < 1e-5


def test_state_that_changes_the_output_is_refused_by_name() -> None:
    def memory(net, h):
        out = h + net.last
        net.last = h.detach()
        return out

    with pytest.raises(ffebm.UnsupportedError, match="attribute 'last'"):
        ffebm.convert(Net(memory), torch.randn(5, 8))

    def schedule(net, h):
        net.count += 1
        return h * (1 + 0.1 * net.count)

    with pytest.raises(ffebm.UnsupportedError, match="attribute 'count'"):
        ffebm.convert(Net(schedule), torch.randn(5, 8))


class Counter:
    """State that is no attribute of a module."""

    calls = 0

    def __init__(self) -> None:
        self.n, self.last = 0, torch.zeros(())

    def step(self) -> int:
        self.n += 1
        return self.n


GLOBAL = [0]


def in_an_object(net, h):
    return h * net.counter.step()


def in_a_nested_container(net, h):
    net.nested["a"]["n"] += 1
    return h * net.nested["a"]["n"]


def in_an_activation(net, h):
    h = h + net.counter.last.mean()
    net.counter.last = h.detach()
    return h


def in_a_class(net, h):
    Counter.calls += 1
    return h * Counter.calls


def in_a_global(net, h):
    GLOBAL[0] += 1
    return h * GLOBAL[0]


def in_a_default(net, h, kept=[0]):  # noqa: B006
    kept[0] += 1
    return h * kept[0]


STATES = (
    in_an_object,
    in_a_nested_container,
    in_an_activation,
    in_a_class,
    in_a_global,
    in_a_default,
)


class Stateful(Net):
    def __init__(self, form) -> None:
        super().__init__(form)
        self.counter, self.nested = Counter(), {"a": {"n": 0}}


@pytest.mark.parametrize("form", STATES, ids=lambda form: form.__name__)
def test_state_outside_of_parameters_and_buffers_is_refused(form) -> None:
    model = nn.Sequential(nn.Linear(8, 8), Stateful(form), nn.Linear(4, 4))
    attribute = {in_an_object: "counter", in_an_activation: "counter", in_a_nested_container: "nested"}.get(form)
    place = f"in the attribute '1.{attribute}'" if attribute else "in module '1' outside of parameters and buffers"
    refusal = rf"output depends on what an earlier call left {place}.*register_buf"
    with pytest.raises(ffebm.UnsupportedError, match=refusal):
        ffebm.convert(model, torch.randn(5, 8))


def average_of_training(net, h):
    if net.training:
        net.last = 0.9 * net.last + 0.1 * h.detach().mean(0)
        return h
    return h - net.last


def schedule_of_training(net, h):
    net.count += net.training
    return h * (1 + net.count) if net.training else h


@pytest.mark.parametrize("form", [average_of_training, schedule_of_training], ids=lambda form: form.__name__)
def test_state_of_training_is_refused_in_training(form) -> None:
    model, x = Net(form).eval(), torch.randn(5, 8)
    hybrid = assert_same(model, x, train=False)
    with pytest.raises(
        ffebm.UnsupportedError, match=r"train mode.*depends on what an earlier call left in the attribute"
    ):
        hybrid.train()(x)


def test_what_training_leaves_in_an_object_is_refused_in_training() -> None:
    def counted(net, h):
        return h * (1 + net.counter.step()) if net.training else h * (1 + net.counter.n)

    def only_kept(net, h):
        return h * (1 + 0 * net.counter.step()) if net.training else h * (1 + net.counter.n)

    for form, what in ((counted, "output"), (only_kept, "output in eval mode")):
        hybrid = assert_same(Stateful(form).eval(), torch.randn(5, 8), train=False)
        with pytest.raises(ffebm.UnsupportedError, match=f"{what} depends on what an earlier call left .* 'counter'"):
            hybrid.train()(torch.randn(5, 8))


def test_what_training_leaves_outside_is_refused() -> None:
    def counted(net, h):
        GLOBAL[0] += net.training
        return h * (1 + GLOBAL[0])

    before = list(GLOBAL)
    hybrid = assert_same(Stateful(counted).eval(), torch.randn(5, 8), train=False)
    assert before == GLOBAL
    with pytest.raises(
        ffebm.UnsupportedError, match="depends on what an earlier call left in module 'Stateful' outside"
    ):
        hybrid.train()(torch.randn(5, 8))


def test_a_first_call_that_alone_gives_something_else_is_set_up() -> None:
    def first(net, h):
        if net.counter.n == 0:
            net.counter.n = 1
            return h * 0
        return h

    model, x = Stateful(first), torch.randn(5, 8)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER)
    before = model(x)
    assert deviation(before, model(x)) > 0.1
    assert deviation(hybrid(x), model(x)) < 1e-5


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_made_by_hooks_are_no_state() -> None:
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Tanh(), nn.utils.spectral_norm(nn.Linear(8, 4)))
    hybrid = ffebm.convert(model, torch.randn(5, 8))
    assert not any("sets attributes" in note for note in hybrid.plan.notes)


def test_generators_flags_and_hooks_stay() -> None:
    def draws(net, h):
        return h + torch.rand(()) + random.random() + float(numpy.random.rand())

    model, other = Net(lambda net, h: h).train(), Net(lambda net, h: draws(net, h)[: int(h.sum())])
    model.b.eval()
    drawn = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    ffebm.convert(model, torch.ones(5, 8))
    with pytest.raises(ffebm.FFEBMError):
        ffebm.convert(other, torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert numpy.random.get_state()[1].tolist() == drawn[2]
    assert model.training
    assert model.a.training
    assert not model.b.training
    assert "training" not in vars(nn.Module)


class Skips(nn.Module):
    """Skips a layer at random, with a generator that is not torch's."""

    def __init__(self, draw: Callable[[], float], always: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.draw, self.always = draw, always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (self.training or self.always) and self.draw() < 0.5:  # DRAWN
            return self.b(x)
        return self.b(torch.tanh(self.a(x)))


GENERATORS = {"Python's own generator": random.random, "numpy's generator": lambda: numpy.random.rand()}


@pytest.mark.parametrize("name", GENERATORS)
def test_draws_of_other_generators_are_refused(name: str) -> None:
    x, state = torch.randn(3, 8), random.getstate()
    place = rf"\({re.escape(__file__)}, line \d+\) at '.*(# DRAWN|numpy\.random\.rand).*', which a captured graph would"
    tracer = sys.gettrace()
    with pytest.raises(ffebm.CaptureError, match=rf"forward draws random numbers from {name}.* {place}.*with torch"):
        ffebm.convert(Skips(GENERATORS[name], always=True), x)
    assert sys.gettrace() is tracer
    model = Skips(GENERATORS[name], always=False).eval()
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    torch.testing.assert_close(hybrid(x), model(x))
    assert any("draws random numbers" in note for note in hybrid.plan.notes)
    with pytest.raises(ffebm.FFEBMError, match="draws random numbers"):
        hybrid.train()(x)
    assert random.getstate() == state


@contextmanager
def drawing_elsewhere() -> Iterator[None]:
    """Another thread draws from Python's generator all the time."""
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            random.uniform(0, 1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_draws_of_other_threads_are_not_the_models() -> None:
    x = torch.randn(3, 8)
    with drawing_elsewhere():
        ffebm.convert(Skips(lambda: 1.0, always=True), x)


DRAWS = {**GENERATORS, "Python's": lambda: random.choice([0.1, 0.9]), "numpy's": lambda: numpy.random.uniform(0, 1)}


@pytest.mark.parametrize("name", DRAWS)
def test_a_models_draws_are_seen_beside_those_of_other_threads(name: str) -> None:
    profile = sys.getprofile()
    with drawing_elsewhere(), pytest.raises(ffebm.CaptureError, match=f"forward draws random numbers from {name}"):
        ffebm.convert(Skips(DRAWS[name], always=True), torch.randn(3, 8))
    assert sys.getprofile() is profile


ROLLS = numpy.random.default_rng(0)
DICE = random.Random(0)
LEGACY = numpy.random.RandomState(0)
OWN = {
    r"a numpy\.random\.Generator of the model's code": lambda net: ROLLS.random(),
    r"a numpy\.random\.\w*\.?RandomState of the model's code": lambda net: LEGACY.rand(),
    r"a random\.Random of the model's code": lambda net: DICE.random(),
    r"a random\.Random \('kept'\)": lambda net: net.kept.random(),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("train", [True, False])
def test_draws_of_a_models_own_generators_are_refused(name: str, train: bool) -> None:
    model = Net(lambda net, h: h * OWN[name](net) if net.training or not train else h)
    model.kept = random.Random(0)
    states = ROLLS.bit_generator.state, DICE.getstate(), LEGACY.get_state()[2], model.kept.getstate()
    if train:
        with pytest.raises(ffebm.FFEBMError, match=f"cannot run in train mode.*draws random numbers from {name}"):
            ffebm.convert(model.eval(), torch.ones(5, 8)).train()(torch.ones(5, 8))
    else:
        with pytest.raises(ffebm.CaptureError, match=f"forward draws random numbers from {name}"):
            ffebm.convert(model, torch.ones(5, 8))
    assert (ROLLS.bit_generator.state, DICE.getstate(), LEGACY.get_state()[2], model.kept.getstate()) == states


NOISE = torch.Generator()


def seeded(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        noise = torch.randn(8)
    return h + noise


def drawn_here(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    return h + torch.randn(8, generator=torch.Generator().manual_seed(1))


SEEDS = {
    "attribute": (lambda net, h: h + torch.rand(8, generator=net.kept), r"a torch\.Generator, whose state"),
    "global": (lambda net, h: h + torch.empty(8).normal_(0.0, 1.0, generator=NOISE), r"a torch\.Generator, whose"),
    "made here": (drawn_here, r"a torch\.Generator, whose state"),
    "seeded": (seeded, "generator is seeded or set here"),
}


@pytest.mark.parametrize("form", SEEDS)
def test_generators_of_torch_and_seeds_are_refused_with_their_line(form: str) -> None:
    compute, reason = SEEDS[form]
    model = Net(compute)
    model.kept = torch.Generator()
    seeds = torch.manual_seed, torch.random.set_rng_state
    states = model.kept.get_state(), NOISE.get_state(), torch.get_rng_state()
    with pytest.raises(ffebm.CaptureError, match=rf"in module 'Net' \(.*test_set_up\.py, line \d+\).*{reason}"):
        ffebm.convert(model, torch.ones(5, 8))
    found = model.kept.get_state(), NOISE.get_state(), torch.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(states, found, strict=True))
    assert (torch.manual_seed, torch.random.set_rng_state) == seeds


def test_torchs_default_generator_may_be_named() -> None:
    assert_same(Net(lambda net, h: h + torch.rand(8, generator=torch.default_generator)), torch.ones(5, 8))


COUNTER = [1.0]
TOTAL = torch.ones(1)


class Holder:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.count, self.table, self.total = 1.0, [1.0], torch.ones(1)


def adds_to(tensor_of: Callable[[nn.Module], torch.Tensor]) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    def forward(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        tensor_of(net).add_(1)
        return h * tensor_of(net)

    return forward


def average(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        net.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return h - net.average


PLAIN = {
    "attribute": adds_to(lambda net: net.total),
    "list": adds_to(lambda net: net.totals[0]),
    "dictionary": adds_to(lambda net: net.totals[1]["a"]),
    "object": adds_to(lambda net: net.holder.total),
    "average": average,
    "train mode": lambda net, h: adds_to(lambda net: net.total)(net, h) if net.training else h * net.total,
}


@pytest.mark.parametrize("form", PLAIN)
def test_tensors_that_are_no_buffers_are_written_as_in_the_source(form: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = Net(PLAIN[form])
        model.total, model.average, model.holder = torch.ones(1), torch.zeros(8), Holder()
        model.totals = [torch.ones(1), {"a": torch.ones(1)}]
        return model

    source, x = made(), torch.randn(5, 8)
    hybrid = ffebm.convert(made(), x, hardware=ONE_LAYER)
    for train in (False, True, False):
        for _ in range(2):
            assert deviation(hybrid.train(train)(x), source.train(train)(x)) < 1e-5
    digital = hybrid.to_digital()
    assert deviation(digital(x), source(x)) < 1e-5


def counts_in_an_object(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    net.holder.count += 1
    return h * net.holder.count


def counts_deep_inside(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    net.holder.table[0] += 1
    return h * net.holder.table[0]


def another_tensor_in_an_object(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    net.holder.total = net.holder.total + 1
    return h * net.holder.total


def counts_outside(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    COUNTER[0] += 1
    return h * COUNTER[0]


def counts_in_the_class(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
    type(net).calls = getattr(type(net), "calls", 1) + 1
    return h * type(net).calls


STATE = {
    "object": (counts_in_an_object, "attribute 'holder'"),
    "deep inside": (counts_deep_inside, "attribute 'holder'"),
    "another tensor": (another_tensor_in_an_object, "attribute 'holder'"),
    "outside": (counts_outside, r"left in module .* outside of parameters and buffers"),
    "class": (counts_in_the_class, r"left in module .* outside of parameters and buffers"),
    "iterator": (lambda net, h: h * next(net.numbers), r"left in module .* outside of parameters and buffers"),
}


@pytest.mark.parametrize("form", STATE)
def test_state_wherever_it_is_kept_is_refused_with_its_cause(form: str) -> None:
    compute, reason = STATE[form]
    model = Net(compute)
    model.holder, model.numbers = Holder(), itertools.count(1)
    with pytest.raises(ffebm.UnsupportedError, match=reason):
        ffebm.convert(model, torch.ones(5, 8))
    assert (model.holder.count, model.holder.table) == (1.0, [1.0])


def test_a_tensor_that_the_code_names_is_as_before() -> None:
    ffebm.convert(Net(lambda net, h: adds_to(lambda _: TOTAL)(net, h)), torch.ones(5, 8))
    assert torch.equal(TOTAL, torch.ones(1))


def test_a_hidden_module_and_a_plain_tensor_are_followed() -> None:
    def compute(net: nn.Module, h: torch.Tensor) -> torch.Tensor:
        return net.teacher[0](h) * net.total

    model, x = Net(compute), torch.randn(5, 8)
    model.teacher, model.total = [nn.Linear(8, 8).requires_grad_(False)], torch.ones(1)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER)
    for network in (hybrid, copy.deepcopy(hybrid)):
        before = network(x)
        network.teacher[0].weight.zero_()
        network.total.fill_(3.0)
        assert deviation(network(x), before) > 0.1
        assert deviation(network(x), network.to_digital()(x)) < 1e-5


class Imports(dict[str, object]):
    """A dictionary whose values are made where they are asked for, as transformers' are."""

    def values(self) -> object:
        raise AssertionError("nobody may ask for the values")

    items = values


LAZY = Imports(a=1)


def test_a_lazy_dictionary_that_the_code_names_stays_lazy() -> None:
    assert_same(Net(lambda net, h: h * (2 if "a" in LAZY else 1)), torch.randn(5, 8))
