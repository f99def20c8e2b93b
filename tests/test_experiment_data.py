"""The readers of `examples/experiment_data.py`, on files that are written here in each format."""

from __future__ import annotations

import contextlib
import gzip
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import ffebm_compiler as ffebm

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import experiment_data as datasets  # noqa: E402

RANDOM = np.random.default_rng(0)


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, zipped: bool) -> None:
    for start, count in (("train", 12), ("t10k", 5)):
        images = np.arange(count * 4 * 6, dtype=np.int64).reshape(count, 4, 6) % 256
        for name, values in (("images-idx3", images), ("labels-idx1", np.arange(count) % 10)):
            raw = idx(values)
            path = folder / f"{start}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)


def batch(count: int, label: str, classes: int, first: int = 0, python2: bool = False) -> bytes:
    rows = (np.arange(count * 3072, dtype=np.int64) % 251).astype(np.uint8).reshape(count, 3072)
    labels = [first + index % classes for index in range(count)]
    found: dict[Any, Any] = {label: labels, "data": rows}
    if python2:
        found = {key.encode(): value for key, value in found.items()}
    return pickle.dumps(found, protocol=2)


def write_cifar10(folder: Path) -> None:
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(batch(20, "labels", 10, python2=True))


def write_cifar100(folder: Path) -> None:
    inner = folder / "cifar-100-python"
    inner.mkdir()
    (inner / "train").write_bytes(batch(200, "fine_labels", 100))
    (inner / "test").write_bytes(batch(100, "fine_labels", 100))


def write_imagenet32(folder: Path) -> None:
    for name in [f"train_data_batch_{n}" for n in range(1, 11)] + ["val_data"]:
        (folder / name).write_bytes(batch(30, "labels", 1000, first=1))


def write_svhn(folder: Path) -> None:
    for name, count in (("train_32x32.mat", 11), ("test_32x32.mat", 10)):
        images = RANDOM.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        values = {"X": images, "y": np.arange(1, count + 1)[:, None] % 10 + 1}
        savemat(folder / name, values, do_compression=True)  # as the authors' are


def write_pictures(folder: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("n01", "n02"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")


WRITERS: dict[str, tuple[str, Callable[[Path], None], tuple[int, ...], int]] = {
    "mnist": ("mnist", lambda folder: write_mnist(folder, zipped=False), (12, 1, 4, 6), 5),
    "fashion-mnist, gzip": ("fashion-mnist", lambda folder: write_mnist(folder, zipped=True), (12, 1, 4, 6), 5),
    "svhn": ("svhn", write_svhn, (11, 3, 32, 32), 10),
    "cifar10": ("cifar10", write_cifar10, (100, 3, 32, 32), 20),
    "cifar100": ("cifar100", write_cifar100, (200, 3, 32, 32), 100),
    "imagenet32": ("imagenet32", write_imagenet32, (300, 3, 32, 32), 30),
    "imagenet32, pictures": ("imagenet32", write_pictures, (6, 3, 32, 32), 4),
}


@pytest.mark.parametrize("case", WRITERS)
def test_every_format(case: str, tmp_path: Path) -> None:
    name, write, shape, tested = WRITERS[case]
    write(tmp_path)
    data = datasets.load(name, tmp_path)
    x, y = data.training
    assert tuple(x.shape) == shape
    assert x.dtype == torch.uint8
    assert y.dtype == torch.long
    assert len(data.test[0]) == len(data.test[1]) == tested
    assert 0 <= int(y.min()) <= int(y.max()) < data.classes
    scaled = data.scaled(x[:2])
    assert scaled.dtype == torch.float32
    assert -1 <= float(scaled.min()) < float(scaled.max()) <= 1


def test_values_arrive_in_their_places(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=False)
    x, y = datasets.load("mnist", tmp_path).training
    assert x[1, 0, 0].tolist() == [24, 25, 26, 27, 28, 29]
    assert y[:3].tolist() == [0, 1, 2]
    write_cifar10(tmp_path)
    x, _ = datasets.load("cifar10", tmp_path).training
    assert x[0, 1, 0, :3].tolist() == [1024 % 251, 1025 % 251, 1026 % 251]
    write_svhn(tmp_path)
    assert datasets.load("svhn", tmp_path).training[1][8:10].tolist() == [0, 1]  # labels 10 and 1


@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_what_ships_inside_packages(name: str) -> None:
    data = datasets.load(name)
    assert data.classes == 10
    assert data.training[0].dtype == torch.float32
    assert data.scaled(data.training[0]) is data.training[0]


def test_the_text_of_the_standard_library() -> None:
    text = datasets.load_text()
    assert len(text.training) > 1_000_000
    assert len(text.validation) > 100_000
    assert int(text.training.max()) < len(text.characters)
    sample = "".join(text.characters[int(n)] for n in text.training[:4000])
    assert "import" in sample


def test_texts_in_a_folder_and_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "ptb.train.txt").write_text("no it was n't black monday \n" * 100, encoding="utf-8")
    (tmp_path / "ptb.valid.txt").write_text("consumers may want to move \n" * 50, encoding="utf-8")
    text = datasets.load_text(tmp_path)
    assert len(text.training) == 2800
    assert len(text.validation) == 1400
    assert text.characters[int(text.validation[0])] == "c"
    alone = datasets.load_text(tmp_path / "ptb.train.txt")
    assert (len(alone.training), len(alone.validation)) == (2520, 280)


class Unwelcome:
    """Would run a command where a file is unpickled."""

    def __reduce__(self) -> Any:
        return print, ("from a pickle",)


def spoil_pickle(folder: Path) -> None:
    write_cifar10(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Unwelcome()}))


def spoil_labels(folder: Path) -> None:
    write_cifar10(folder)
    (folder / "test_batch").write_bytes(batch(20, "labels", 12))


def truncate(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])

    return spoil


def without(name: str, write: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write(folder)
        (folder / name).unlink()

    return spoil


def spoil_picture(folder: Path) -> None:
    write_pictures(folder)
    (folder / "train" / "n02" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")


def add_class(folder: Path) -> None:
    write_pictures(folder)
    (folder / "val" / "n09").mkdir()


def pickled(raw: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        write_cifar10(folder)
        (folder / "data_batch_3").write_bytes(raw)

    return spoil


def mixed_labels(folder: Path) -> None:
    write_mnist(folder, zipped=False)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(7)))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("cifar10", without("data_batch_4", write_cifar10), r"has no file data_batch_4: download it there"),
        ("cifar10", truncate("data_batch_2", write_cifar10), r"data_batch_2 is no complete batch of images"),
        ("cifar10", spoil_pickle, r"data_batch_3 is no complete batch of images \(it holds a builtins.print\)"),
        ("cifar10", spoil_labels, r"cifar10 has test labels from 0 to 11; expected labels of 10 classes"),
        ("cifar10", pickled(batch(20, "labels", 10).replace(b"latin1", b"lati31")), r"\(unknown encoding: lati31\)"),
        ("cifar10", pickled(b"\x80\x02}r\xff\xff\xff\x7f."), r"\(it names place 2147483647 of its memo\)"),
        ("cifar10", pickled(b"\x80\x05\x96" + bytes(5) + b"\1\0\0."), r"bytes in a bytearray8, but only 1 remain\)"),
        (
            "cifar10",
            pickled(pickle.dumps({"data": None, "labels": [1]})),
            r"data_batch_3 is no complete batch of images",
        ),
        ("mnist", lambda _: None, r"has no file train-images-idx3-ubyte or train-images-idx3-ubyte.gz"),
        (
            "mnist",
            truncate("t10k-images-idx3-ubyte", lambda folder: write_mnist(folder, zipped=False)),
            r"t10k-images-idx3-ubyte is truncated: it holds 20 of the 120 values",
        ),
        (
            "mnist",
            truncate("train-images-idx3-ubyte.gz", lambda folder: write_mnist(folder, zipped=True)),
            r"train-images-idx3-ubyte.gz is no complete gzip file",
        ),
        ("mnist", mixed_labels, r"mnist has 12 training inputs and 7 labels; expected one for each"),
        ("svhn", truncate("test_32x32.mat", write_svhn), r"test_32x32.mat is no complete file of SVHN"),
        ("imagenet32", spoil_picture, r"1.png is no complete picture"),
        ("imagenet32", add_class, r"val has the class 'n09', which the training pictures do not have"),
    ],
)
def test_bad_files_are_named(name: str, spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(ffebm.InputError, match=message):
        datasets.load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "write", "file"),
    [
        ("cifar10", write_cifar10, "data_batch_1"),
        ("mnist", lambda folder: write_mnist(folder, zipped=False), "train-images-idx3-ubyte"),
        ("mnist", lambda folder: write_mnist(folder, zipped=True), "train-images-idx3-ubyte.gz"),
        ("imagenet32", write_pictures, "train/n02/1.png"),
    ],
)
def test_damaged_files_are_read_or_named(name: str, write: Callable[[Path], None], file: str, tmp_path: Path) -> None:
    """A file with some other bytes, most of them in its head, or cut anywhere."""
    write(tmp_path)
    path, random = tmp_path / file, np.random.default_rng(1)
    raw = path.read_bytes()
    for _ in range(100):
        damaged = np.frombuffer(raw, np.uint8).copy()
        for at in random.integers(0, [min(400, len(raw)), len(raw)], (random.integers(1, 4), 2)).ravel():
            damaged[at] = random.integers(256)
        path.write_bytes(damaged.tobytes()[: random.choice([len(raw), random.integers(len(raw))])])
        with contextlib.suppress(ffebm.InputError):
            datasets.load(name, tmp_path)


def with_batch(folder: Path, data: Any, labels: Any) -> datasets.Data:
    """CIFAR-10 whose third file holds these."""
    write_cifar10(folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    return datasets.load("cifar10", folder)


BYTES = np.arange(2 * 3072).reshape(2, 3, 32, 32) % 251
PIXELS = BYTES.astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (PIXELS.reshape(2, -1), [7, 2]),
        (PIXELS.reshape(2, -1).tolist(), [7, 2]),
        (PIXELS, np.array([[7], [2]])),
        (PIXELS.transpose(0, 2, 3, 1), [7.0, 2.0]),
        (BYTES.astype(np.int16).reshape(2, -1), np.array([7, 2], np.uint8)),
    ],
)
def test_bytes_in_other_forms_are_read_right(data: Any, labels: Any, tmp_path: Path) -> None:
    x, y = with_batch(tmp_path, data, labels).training
    assert torch.equal(x[40:42], torch.from_numpy(PIXELS))
    assert y[40:42].tolist() == [7, 2]


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        ((PIXELS / 255).astype(np.float32), [7, 2], "images of float32 values from 0 to 0.980392; expected whole"),
        (BYTES - 128, [7, 2], "images of int64 values from -128 to 122; expected whole numbers from 0 to 255"),
        (np.full((2, 3072), np.nan), [7, 2], "images of float64 values from nan to nan; expected whole numbers"),
        (PIXELS > 100, [7, 2], "images of bool values; expected whole numbers"),
        (PIXELS.reshape(2, 32, 96), [7, 2], r"images of shape \(2, 32, 96\); expected \(images, 3072\)"),
        (PIXELS, [0.9, 2], "labels that are no whole numbers, such as 0.9"),
        (PIXELS, [1.0, np.nan], "labels that are no whole numbers, such as nan"),
        (PIXELS, [True, False], "labels that are no whole numbers, such as True"),
        (PIXELS, np.eye(10)[[7, 2]], r"labels of shape \(2, 10\); expected one number for each image"),
        (PIXELS, [7, 2, 3], "has 2 images and 3 labels; expected one for each"),
        (PIXELS, [None, 2], "is no complete batch of images"),
    ],
)
def test_values_of_another_scale_or_form_are_refused(data: Any, labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ffebm.InputError, match=f"data_batch_3 .*{message}|data_batch_3 {message}"):
        with_batch(tmp_path, data, labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"X": np.full((32, 32, 3, 2), 0.5), "y": np.ones((2, 1))}, "images of float64 values from 0.5 to 0.5"),
        ({"X": PIXELS, "y": np.ones((2, 1))}, r"holds X of shape \(2, 3, 32, 32\)"),
        ({"X": PIXELS.transpose(2, 3, 1, 0), "y": np.array([[11], [1]])}, "has labels from 1 to 11; expected 1 to 10"),
    ],
)
def test_odd_files_of_svhn_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_svhn(tmp_path)
    savemat(tmp_path / "train_32x32.mat", values)
    with pytest.raises(ffebm.InputError, match=f"train_32x32.mat {message}|train_32x32.mat has {message}"):
        datasets.load("svhn", tmp_path)


def test_upper_case_pictures_are_read_and_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    expected = datasets.load("cifar10", tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / part / "n01" / "._0.png").write_bytes(b"of another system")
    for index in range(3):
        (tmp_path / "train" / "n02" / f"{index}.png").rename(tmp_path / "train" / "n02" / f"{index}.PNG")
    found = datasets.load("cifar10", tmp_path)
    assert found.classes == 2
    for (x, y), (images, labels) in zip((found.training, found.test), (expected.training, expected.test), strict=True):
        assert torch.equal(x, images)
        assert torch.equal(y, labels)


def test_classes_without_pictures_and_pictures_of_16_bits_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    deep = tmp_path / "train" / "n01" / "0.png"
    Image.fromarray(np.full((32, 32), 1000, np.uint16)).save(deep)
    with pytest.raises(ffebm.InputError, match=r"n01/0\.png has more than 8 bits a value \(mode I;16\)"):
        datasets.load("cifar10", tmp_path)
    deep.unlink()
    (tmp_path / "train" / "n00").mkdir()
    with pytest.raises(ffebm.InputError, match=r"train/n00 has no \.png: put the pictures of this class there"):
        datasets.load("cifar10", tmp_path)


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(ffebm.InputError, match=r"there is no data set 'mnst': choose one of digits, mnist1d, mnist"):
        datasets.load("mnst")
    with pytest.raises(ffebm.InputError, match="mnist is read from a folder, and none is given"):
        datasets.load("mnist")
    with pytest.raises(ffebm.InputError, match="is no folder; svhn is read from a folder"):
        datasets.load("svhn", tmp_path / "missing")
    with pytest.raises(ffebm.InputError, match="has no file with 'train' and one with 'valid' in its name"):
        datasets.load_text(tmp_path)
    with pytest.raises(ffebm.InputError, match="cannot be read as UTF-8 text"):
        datasets.load_text(tmp_path / "missing.txt")
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ffebm.InputError, match="has 9 characters, too few"):
        datasets.load_text(tmp_path / "short.txt")


@pytest.mark.parametrize(("name", "package"), [("mnist1d", "mnist1d"), ("digits", "sklearn"), ("svhn", "scipy")])
def test_a_package_that_is_not_installed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [package, *(found for found in sys.modules if found.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    asked = {"sklearn": "scikit-learn"}.get(package, package)
    told = f"^{name} needs the package {asked}, which is not installed: pip install {asked}$"
    with pytest.raises(ffebm.InputError, match=told):
        datasets.load(name, tmp_path)


def test_its_command_line(tmp_path: Path) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / "experiment_data.py"), name, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    write_cifar10(tmp_path)
    done = run("cifar10")
    assert done.stdout.splitlines()[0] == "cifar10, training: (100, 3, 32, 32) of torch.uint8, labels 0 to 9"
    failed = run("svhn")
    assert failed.returncode == 2
    assert failed.stderr.startswith("experiment_data.py: ")
