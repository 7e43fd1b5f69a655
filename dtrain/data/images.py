"""`kind: images`: pictures with labels from IDX or NPZ files, flattened, in [0, 1]; `path: digits` needs no file.

    IDX (LeCun's format of MNIST and its many followers), big-endian, plain or .gz:
        images  00 00 08 03 | n | height | width | n·height·width bytes
        labels  00 00 08 01 | n | n bytes

Labels are class numbers as they stand: 0 up to the largest.
"""

import math
import os
import struct
from pathlib import Path

import numpy as np

from dtrain.arrays import Array
from dtrain.config import ImagesConfig
from dtrain.data import sources, store
from dtrain.data.dataset import Data
from dtrain.data.rows import read_npz, row_data, write_rows
from dtrain.errors import UserError

NPZ_NAMES = [("x", "y"), ("images", "labels"), ("x_train", "y_train")]  # the last: Keras' mnist.npz
MOST = 1 << 20  # classes: a larger label means that the file is something else


def open_images(config: ImagesConfig, sequence: int, seed: int, vocabulary: int | None, mask: bool) -> Data:
    """The samples of a pair of IDX files, of an NPZ file, or scikit-learn's 1797 handwritten digits of 8 x 8."""
    if config.path == "digits":
        entry = sources.name_of_entry([], "digits")
        folder = store.cached("images", entry, _make_digits)
    else:
        files = _files(config)
        entry = sources.name_of_entry(files, "images")
        folder = store.cached("images", entry, lambda folder: _make(folder, config.path, files))
    return row_data(folder, config.path, seed, config.validation, vocabulary, f"images {config.path}")


def _files(config: ImagesConfig) -> list[str]:
    """One NPZ file, or the IDX files of images and labels; of a folder with several those of the training set."""
    path, found = config.path, sources.files_of(config.path)
    if len(found) > 1:
        images = [name for name in found if name.endswith(".npz") or "idx3" in os.path.basename(name)]
        found = [name for name in images if os.path.basename(name).startswith("train")] or images
        if len(found) != 1:
            names = ", ".join(os.path.basename(name) for name in found[:5]) or "none"
            raise UserError(f"data.path: {path}: name one file of images; .npz and idx3 files found: {names}")
    if found[0].endswith(".npz"):
        return found
    return [
        found[0],
        _labels(found[0]) if config.labels is None else os.path.abspath(os.path.expanduser(config.labels)),
    ]


def _labels(images: str) -> str:
    """The file beside `images` that is named like it, with labels for images and idx1 for idx3."""
    folder, name = os.path.split(images)
    name = name.replace("images", "labels").replace("idx3", "idx1")
    for choice in (name, name.removesuffix(".gz"), name + ".gz"):
        beside = os.path.join(folder, choice)
        if beside != images and os.path.exists(beside):
            return beside
    raise UserError(f"data.labels: there is no {os.path.join(folder, name)}; name the file of the labels of {images}")


def _make(folder: Path, path: str, files: list[str]) -> None:
    if len(files) == 1:
        x, y = read_npz(path, files[0], NPZ_NAMES)
    else:
        x, y = read_idx(files[0], dims=3), read_idx(files[1], dims=1)
        if len(x) != len(y):
            raise UserError(f"data.path: {path}: {len(x)} images, but {len(y)} labels in {files[1]}")
        x = x.reshape(len(x), -1) if len(x) else x.reshape(0, 1)
    if len(x) == 0:
        raise UserError(f"data.path: {path}: there are no images in it")
    if y.dtype.kind not in "iuf" or y.min() < 0 or not np.array_equal(y, np.floor(y)):
        raise UserError(f"data.path: {path}: labels must be whole numbers from 0 on, not {y.dtype} from {y.min()}")
    if y.max() >= MOST:
        raise UserError(f"data.path: {path}: the label {y.max()}; labels are numbers of classes, allowed: below {MOST}")
    classes = [str(i) for i in range(int(y.max()) + 1)]
    write_rows(folder, x, y, classes, _divisor(x, path))


def _divisor(x: Array, path: str) -> float:
    """What brings the values into [0, 1]: 255 for bytes, the largest value for other integers."""
    if x.dtype == np.uint8:
        return 255.0
    if x.min() < 0 or (x.dtype.kind == "f" and x.max() > 1):
        raise UserError(
            f"data.path: {path}: values from {x.min()} to {x.max()}; allowed: integers from 0 on, or floats in [0, 1]"
        )
    return 1.0 if x.dtype.kind in "fb" else max(1.0, float(x.max()))


def read_idx(name: str, dims: int) -> Array:
    """The array of bytes with `dims` dims in an IDX file, plain or gzip-compressed."""
    content = sources.whole(Path(name))
    if content[:2] == b"\x1f\x8b":
        import gzip
        import zlib

        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"data.path: {name}: is no whole gzip file: {error}") from error
    header = 4 + 4 * dims
    magic = bytes([0, 0, 8, dims])
    if content[:4] != magic:
        raise UserError(
            f"data.path: {name}: starts with {content[:4].hex()}; an IDX file of this kind with {magic.hex()}"
        )
    if len(content) < header:
        raise UserError(f"data.path: {name}: {len(content)} bytes, cut off inside its header of {header}")
    shape = struct.unpack(f">{dims}I", content[4:header])
    size = header + math.prod(shape)
    if len(content) != size:
        raise UserError(
            f"data.path: {name}: {len(content)} bytes, but its header {shape} asks for {size}: cut off or damaged"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _make_digits(folder: Path) -> None:
    """Import scikit-learn (a second) only here: every later run reads the cache."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            f"data.path: digits: they are part of scikit-learn, which cannot be imported ({error}): "
            "pip install 'dtrain[digits]'; or name IDX or NPZ files"
        ) from error
    x, y = load_digits(return_X_y=True)
    write_rows(folder, x.astype(np.uint8), y, [str(i) for i in range(10)], divisor=16.0)
