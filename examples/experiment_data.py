"""The data of the experiments: what ships inside packages, and the field's data sets from a folder of yours.

    .venv/bin/python examples/experiment_data.py [NAME [FOLDER]]

prints what a data set holds (`digits` without arguments). Nothing is downloaded. `digits` (scikit-learn) and `mnist1d`
need no folder. The others are read from the files that their authors publish:

| name | files in the folder |
| --- | --- |
| `mnist`, `fashion-mnist` | `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, each also with `.gz` |
| `svhn` | `train_32x32.mat`, `test_32x32.mat` |
| `cifar10` | `data_batch_1` to `data_batch_5`, `test_batch` (python pickles), here or in `cifar-10-batches-py` |
| `cifar100` | `train`, `test` (python pickles), here or in `cifar-100-python` |
| `imagenet32` | `train_data_batch_1` to `train_data_batch_10`, `val_data` (python pickles) |
| any of the last three | or pictures: `train/CLASS/*.png`, and `test/CLASS/*.png` or `val/CLASS/*.png`, of 8 bits a value |

Values that are no bytes, labels that are no whole numbers, and classes without pictures are refused with the file's name.
Hidden folders and files are no classes and no pictures.

`text` gives characters: of the standard library's own source, or of `*train*` and `*valid*` files in a folder (Penn
Treebank, WikiText), or of one plain text file, whose last tenth is then held out.
"""  # noqa: E501

from __future__ import annotations

import argparse
import gzip
import io
import math
import pickle
import pickletools
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ffebm_compiler as ffebm

__all__ = ["NAMES", "Data", "Text", "load", "load_text"]


@dataclass(frozen=True)
class Data:
    """Labelled inputs. Images are bytes, channels first."""

    name: str
    training: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    def scaled(self, x: Tensor) -> Tensor:
        """Inputs of a batch for a network: bytes become numbers from -1 to 1, other inputs stay."""
        return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.training[0].device

    def to(self, device: torch.device) -> Data:
        """The data on a device."""
        parts = [(x.to(device), y.to(device)) for x, y in (self.training, self.test)]
        return replace(self, training=parts[0], test=parts[1])

    def first(self, training: int, test: int) -> Data:
        """So many of the inputs, for a quick look."""
        (x, y), (held, labels) = self.training, self.test
        return replace(self, training=(x[:training], y[:training]), test=(held[:test], labels[:test]))


@dataclass(frozen=True)
class Text:
    """Characters by number, to train on and to validate on."""

    training: Tensor
    validation: Tensor
    characters: str


def load(name: str, folder: str | Path | None = None) -> Data:
    """A data set by its name.

    Raises:
        InputError: there is no such data set; a file is missing, truncated or of another format; labels do not belong
            to the images; a package that reads them is not installed.
    """
    if name not in _LOADERS:
        raise ffebm.InputError(f"there is no data set {name!r}: choose one of {', '.join(_LOADERS)}")
    if name in _INSIDE:
        return _checked(_with_packages(name, _INSIDE[name]))
    if folder is None:
        raise ffebm.InputError(
            f"{name} is read from a folder, and none is given: download its files and name it by --folder"
        )
    place = Path(folder)
    if not place.is_dir():
        raise ffebm.InputError(f"{place} is no folder; {name} is read from a folder with its files")
    return _checked(_with_packages(name, partial(_LOADERS[name], place)))


def load_text(place: str | Path | None = None) -> Text:
    """Characters of a text, with the rare ones (below one in 100 000) as one.

    Raises:
        InputError: the file or folder is missing, or holds no text to train and to validate on.
    """
    training, validation = _texts(place)
    counts: dict[str, int] = {}
    for character in training:
        counts[character] = counts.get(character, 0) + 1
    known = sorted(c for c, count in counts.items() if count >= max(2, len(training) // 100_000))
    numbers = {character: index for index, character in enumerate(known)}
    other = len(known)

    def encoded(text: str) -> Tensor:
        return torch.tensor([numbers.get(character, other) for character in text], dtype=torch.long)

    return Text(encoded(training), encoded(validation), "".join(known) + "\ufffd")


# -- inside packages -----------------------------------------------------------------------------


def _digits() -> Data:
    """1 797 images of 8 × 8 pixels (scikit-learn), 357 of them, drawn once, to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(found.target)[order]
    return Data("digits", (x[:1440], y[:1440]), (x[1440:], y[1440:]), 10)


def _mnist1d() -> Data:
    """4 000 and 1 000 signals of 40 samples, generated (Greydanus & Kobak 2020, arXiv 2011.14439)."""
    from mnist1d.data import get_dataset_args, make_dataset

    found = make_dataset(get_dataset_args())

    def part(ending: str) -> tuple[Tensor, Tensor]:
        return torch.tensor(found["x" + ending], dtype=torch.float32)[:, None], torch.tensor(found["y" + ending])

    return Data("mnist1d", part(""), part("_test"), 10)


# -- files ---------------------------------------------------------------------------------------


def _mnist(name: str) -> Callable[[Path], Data]:
    def read(folder: Path) -> Data:
        def part(start: str) -> tuple[Tensor, Tensor]:
            images = _idx(_found(folder, f"{start}-images-idx3-ubyte", f"{start}-images-idx3-ubyte.gz"), 3)
            labels = _idx(_found(folder, f"{start}-labels-idx1-ubyte", f"{start}-labels-idx1-ubyte.gz"), 1)
            return torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()

        return Data(name, part("train"), part("t10k"), 10)

    return read


def _idx(path: Path, dims: int) -> np.ndarray:
    """The bytes of an idx file: two zeros, 8 (bytes), the number of dimensions, their sizes, the values."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        with _whole(path, "gzip file"):
            raw = gzip.decompress(raw)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08" or raw[3] != dims or len(raw) < 4 + 4 * dims:
        raise ffebm.InputError(f"{path} is no idx file of bytes with {dims} dimensions: download it again")
    sizes = [int(size) for size in np.frombuffer(raw, ">u4", dims, 4)]
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dims)
    if len(values) != math.prod(sizes):
        raise ffebm.InputError(
            f"{path} is truncated: it holds {len(values)} of the {math.prod(sizes)} values that its head says. "
            "Download it again"
        )
    return values.reshape(sizes).copy()


def _svhn(folder: Path) -> Data:
    from scipy.io import loadmat

    def part(name: str) -> tuple[Tensor, Tensor]:
        path = _found(folder, name)
        with _whole(path, "file of SVHN"):
            found = loadmat(path)
            given, numbers = _array(found["X"]), _array(found["y"])
        images, labels = _bytes(path, given), _labels(path, numbers)
        if images.shape[:3] != (32, 32, 3) or images.ndim != 4:
            raise ffebm.InputError(f"{path} holds X of shape {images.shape}; expected (32, 32, 3, images)")
        if ((labels < 0) | (labels > 10)).any():
            raise ffebm.InputError(f"{path} has labels from {labels.min()} to {labels.max()}; expected 1 to 10")
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
        return x, torch.from_numpy(labels) % 10  # 10 stands for the digit 0

    return Data("svhn", part("train_32x32.mat"), part("test_32x32.mat"), 10)


def _pickled(
    name: str, training: list[str], test: str, inner: str, labels: tuple[str, ...], classes: int, first: int = 0
) -> Callable[[Path], Data]:
    """A reader of pickled batches: dictionaries of `data`, rows of 3·32·32 bytes, and labels that begin at `first`."""

    def read(folder: Path) -> Data:
        place = folder / inner if (folder / inner).is_dir() else folder
        if (folder / "train").is_dir():
            return _pictures(name, folder)
        parts = [_batch(_found(place, file), labels, first) for file in training]
        x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        return Data(name, (x, y), _batch(_found(place, test), labels, first), classes)

    return read


class _OnlyArrays(pickle.Unpickler):
    """Reads containers, numbers, texts and numpy arrays. Another object in a file could run any code."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _batch(path: Path, names: tuple[str, ...], first: int) -> tuple[Tensor, Tensor]:
    raw = path.read_bytes()
    with _whole(path, "batch of images"):
        _check_memo(raw)
        found = _OnlyArrays(io.BytesIO(raw), encoding="bytes").load()
        given = {key.decode() if isinstance(key, bytes) else key: value for key, value in found.items()}
        data, numbers = _array(given["data"]), _array(next(given[name] for name in names if name in given))
    images, labels = _channels_first(path, _bytes(path, data)), _labels(path, numbers)
    if len(images) != len(labels):
        raise ffebm.InputError(f"{path} has {len(images)} images and {len(labels)} labels; expected one for each")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels - first)


def _array(values: Any) -> np.ndarray:
    found = np.asarray(values)
    if found.dtype.kind not in "biuf" or not found.ndim:
        raise TypeError(f"it holds {type(values).__name__} where numbers are expected")
    return found


def _bytes(path: Path, values: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 255, as bytes. The scale of others is not known."""
    if values.dtype.kind not in "iu" or (values.size and (values.min() < 0 or values.max() > 255)):
        reach = f" from {values.min():g} to {values.max():g}" if values.size and values.dtype.kind != "b" else ""
        raise ffebm.InputError(
            f"{path} has images of {values.dtype} values{reach}; expected whole numbers from 0 to 255, as the authors "
            "publish them: undo what was done to them, or download the file again"
        )
    return values.astype(np.uint8)


def _labels(path: Path, values: np.ndarray) -> np.ndarray:
    """One whole number for each image, of any type and in a row or a column."""
    flat = values.reshape(-1) if values.ndim == 2 and 1 in values.shape else values
    if flat.ndim != 1:
        raise ffebm.InputError(
            f"{path} has labels of shape {values.shape}; expected one number for each image (of one-hot labels, the "
            "position of the one)"
        )
    if flat.dtype.kind == "b" or not (np.isfinite(flat).all() and (flat == np.floor(flat)).all()):
        raise ffebm.InputError(f"{path} has labels that are no whole numbers, such as {_odd_one(flat)}")
    return flat.astype(np.int64)


def _odd_one(labels: np.ndarray) -> Any:
    odd = labels if labels.dtype.kind == "b" else labels[~np.isfinite(labels) | (labels != np.floor(labels))]
    return odd[0]


def _channels_first(path: Path, images: np.ndarray) -> np.ndarray:
    """Images of shape (n, 3, 32, 32), of rows in this order or of images with their channels last."""
    if images.shape[1:] == (32, 32, 3):
        return images.transpose(0, 3, 1, 2)
    if images.shape[1:] not in ((3072,), (3, 32, 32)):
        raise ffebm.InputError(
            f"{path} has images of shape {images.shape}; expected (images, 3072), (images, 3, 32, 32) or "
            "(images, 32, 32, 3)"
        )
    return images.reshape(-1, 3, 32, 32)


def _check_memo(raw: bytes) -> None:
    """That the lengths and the places of the memo in a pickle are within it. Unpickling makes room for any."""
    for operation, argument, _ in pickletools.genops(raw):
        if operation.name in ("PUT", "LONG_BINPUT") and argument > len(raw):
            raise pickle.UnpicklingError(f"it names place {argument} of its memo")


@contextmanager
def _whole(path: Path, what: str) -> Iterator[None]:
    """Name a file that cannot be read. What readers raise at damaged files is anything."""
    try:
        yield
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ffebm.InputError(f"{path} is no complete {what} ({reason}): download it again") from None


def _pictures(name: str, folder: Path) -> Data:
    """Pictures in a folder for each class."""
    classes = _class_folders(folder / "train")
    held = folder / ("test" if (folder / "test").is_dir() else "val")
    if not held.is_dir():
        raise ffebm.InputError(f"{folder} has pictures to train on, but no folder 'test' or 'val' beside them")
    if not classes:
        raise ffebm.InputError(f"{folder / 'train'} has no folder for any class")
    training, test = _classes(folder / "train", classes), _classes(held, classes)
    return Data(name, training, test, len(classes))


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _classes(folder: Path, classes: list[str]) -> tuple[Tensor, Tensor]:
    found = _class_folders(folder)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise ffebm.InputError(f"{folder} has the class {unknown[0]!r}, which the training pictures do not have")
    images: list[np.ndarray] = []
    labels = []
    for name in found:
        for path in _png_files(folder / name):
            images.append(_picture(path))
            labels.append(classes.index(name))
            if images[-1].shape != images[0].shape:
                raise ffebm.InputError(
                    f"{path} has shape {images[-1].shape}, the first one {images[0].shape}: scale all to one size"
                )
    if not images:
        raise ffebm.InputError(f"{folder} has no folder with pictures of any class")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


def _png_files(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith(".")]
    if not found:
        raise ffebm.InputError(f"{folder} has no .png: put the pictures of this class there, or remove the folder")
    return sorted(found)


def _picture(path: Path) -> np.ndarray:
    """The bytes of a picture, channels first."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # converting these clips what is above 255
                raise ffebm.InputError(f"{path} has more than 8 bits a value (mode {picture.mode}): save it with 8")
            return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ffebm.InputError(f"{path} is no complete picture ({error})") from None


def _texts(place: str | Path | None) -> tuple[str, str]:
    if place is None:
        sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        whole = "".join(path.read_text(encoding="utf-8", errors="replace") for path in sources)
        return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]
    path = Path(place)
    if path.is_dir():
        found = [sorted(path.glob(f"*{part}*")) for part in ("train", "valid")]
        if not all(found):
            raise ffebm.InputError(f"{path} has no file with 'train' and one with 'valid' in its name")
        parts = [_text_of(files[0]) for files in found]
        return parts[0], parts[1]
    whole = _text_of(path)
    return whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def _text_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ffebm.InputError(f"{path} cannot be read as UTF-8 text ({error})") from None
    if len(text) < 1000:
        raise ffebm.InputError(f"{path} has {len(text)} characters, too few to train on and to validate on")
    return text


# -- checks --------------------------------------------------------------------------------------


def _with_packages(name: str, read: Callable[[], Data]) -> Data:
    try:
        return read()
    except ModuleNotFoundError as error:
        module = str(error.name).split(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module, module)
        raise ffebm.InputError(
            f"{name} needs the package {package}, which is not installed: pip install {package}"
        ) from None


def _found(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ffebm.InputError(f"{folder} has no file {' or '.join(names)}: download it there")


def _checked(data: Data) -> Data:
    for part, (x, y) in (("training", data.training), ("test", data.test)):
        if len(x) != len(y) or not len(x):
            raise ffebm.InputError(f"{data.name} has {len(x)} {part} inputs and {len(y)} labels; expected one for each")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= data.classes:
            raise ffebm.InputError(
                f"{data.name} has {part} labels from {low} to {high}; expected labels of {data.classes} classes"
            )
        if x.shape[1:] != data.training[0].shape[1:]:
            raise ffebm.InputError(f"{data.name} has inputs of shapes {x.shape[1:]} and {data.training[0].shape[1:]}")
    return data


_INSIDE: dict[str, Callable[[], Data]] = {"digits": _digits, "mnist1d": _mnist1d}
_LOADERS: dict[str, Any] = {
    **_INSIDE,
    "mnist": _mnist("mnist"),
    "fashion-mnist": _mnist("fashion-mnist"),
    "svhn": _svhn,
    "cifar10": _pickled(
        "cifar10", [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "cifar-10-batches-py", ("labels",), 10
    ),
    "cifar100": _pickled("cifar100", ["train"], "test", "cifar-100-python", ("fine_labels",), 100),
    "imagenet32": _pickled(
        "imagenet32", [f"train_data_batch_{n}" for n in range(1, 11)], "val_data", "Imagenet32", ("labels",), 1000, 1
    ),
}
NAMES = tuple(_LOADERS)
"""Names of the data sets with labels."""


def main() -> None:
    """Print what a data set holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=(*NAMES, "text"), default="digits")
    parser.add_argument("folder", nargs="?", type=Path)
    options = parser.parse_args()
    try:
        if options.name == "text":
            text = load_text(options.folder)
            print(f"{len(text.training)} and {len(text.validation)} characters, {len(text.characters)} different ones")
            return
        data = load(options.name, options.folder)
    except ffebm.FFEBMError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for part, (x, y) in (("training", data.training), ("test", data.test)):
        print(f"{data.name}, {part}: {tuple(x.shape)} of {x.dtype}, labels {int(y.min())} to {int(y.max())}")


if __name__ == "__main__":
    main()
