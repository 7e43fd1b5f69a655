"""Reading: any slice from any shards, and what belongs to another model is told as that."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain import manifest as manifests
from dtrain.checkpoint import Piece, Reader, check_names, latest, save, scan
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.safetensors_file import Mapped
from tests.checkpoints import SHARD, save_one

pytestmark = pytest.mark.usefixtures("fast_disk")


def rows(array, rank, size):
    edges = np.linspace(0, array.shape[0], size + 1).astype(int)
    return array[edges[rank] : edges[rank + 1]], (int(edges[rank]),) + (0,) * (array.ndim - 1)


def columns(array, rank, size):
    part, start = rows(np.moveaxis(array, -1, 0), rank, size)
    return np.moveaxis(part, 0, -1), (0,) * (array.ndim - 1) + (start[0],)


def replicated(array, rank, size):
    return array, (0,) * array.ndim


LAYOUTS = {"rows": rows, "columns": columns, "replicated": replicated}


@pytest.mark.parametrize(("written", "read"), [*itertools.product(LAYOUTS, LAYOUTS)])
@pytest.mark.parametrize("sizes", [(1, 3), (4, 2), (3, 8)])
def test_what_one_layout_wrote_another_reads(tmp_path, written, read, sizes):
    arrays = {
        "m": np.random.default_rng(0).standard_normal((7, 10)),
        "v": np.arange(5, dtype=np.float32),
        "t": np.arange(4 * 3 * 6).reshape(4, 3, 6).astype(ml_dtypes.bfloat16),
    }

    def run(comm):
        pieces = []
        for name, array in arrays.items():
            part, start = LAYOUTS[written](array, comm.rank, comm.size)
            pieces.append(Piece(name, part, start, array.shape))
        return save(tmp_path, 1, comm, pieces, {})

    reader = Reader(run_threads(sizes[0], run)[0])
    for name, array in arrays.items():
        for rank in range(sizes[1]):
            part, start = LAYOUTS[read](array, rank, sizes[1])
            found = reader.read(name, start, part.shape)
            assert found.dtype == part.dtype and np.array_equal(found, part)


@st.composite
def tilings(draw):
    """A shape, and boxes that tile it: cut at random places in random dims."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        start, stop = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(start[dim], stop[dim]))  # empty pieces, too: ranks without a share have them
        boxes.append((start, (*stop[:dim], cut, *stop[dim + 1 :])))
        boxes.append(((*start[:dim], cut, *start[dim + 1 :]), stop))
    return shape, boxes


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), tiling=tilings(), size=st.integers(1, 3))
def test_any_tiling_by_any_ranks_is_the_global_array(tmp_path, data, tiling, size):
    shape, boxes = tiling
    array = np.random.default_rng(len(boxes)).standard_normal(shape)
    ranks = st.sets(st.integers(0, size - 1), min_size=1)
    holders = [data.draw(ranks) for _ in boxes]

    def run(comm):
        mine = [box for box, held in zip(boxes, holders, strict=True) if comm.rank in held]
        pieces = [Piece("a", array[tuple(map(slice, *box))], box[0], shape) for box in dict.fromkeys(mine)]
        return save(tmp_path, 1, comm, pieces, {})

    reader = Reader(run_threads(size, run)[0])
    assert np.array_equal(reader.read("a"), array)
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    part = tuple(data.draw(st.integers(0, n - a)) for n, a in zip(shape, start, strict=True))
    out = np.full(part, np.nan)
    found = reader.read("a", start, part, out)
    assert found is out
    assert np.array_equal(out, array[tuple(slice(a, a + n) for a, n in zip(start, part, strict=True))])


@settings(max_examples=150, deadline=None)
@given(tiling=tilings(), data=st.data())
def test_a_tiling_is_accepted_if_each_element_is_covered_once(tiling, data):
    shape, boxes = tiling
    boxes = [box for box in boxes if all(a < b for a, b in zip(*box, strict=True))]
    for _ in range(data.draw(st.integers(0, 2))):  # spoil it, or not
        index = data.draw(st.integers(0, max(0, len(boxes) - 1)))
        change = data.draw(st.sampled_from(["drop", "double", "grow"]))
        if change == "drop" and boxes:
            boxes.pop(index)
        elif change == "double" and boxes:
            boxes.append(boxes[index])
        elif change == "grow" and boxes:
            boxes[index] = (boxes[index][0], shape)
    count = np.zeros(shape, int)
    for box in boxes:
        count[tuple(map(slice, *box))] += 1
    if (count == 1).all():
        manifests.check_tiling("a", shape, boxes)
    else:
        with pytest.raises(ValueError, match=r"^a: .* slices? ha(s|ve) \[") as caught:
            manifests.check_tiling("a", shape, boxes)
        text = str(caught.value)
        where = text[text.index("[") + 1 : text.index("]")]
        named = count[tuple(slice(*map(int, part.split(":"))) for part in where.split(",") if part)]
        expected = 0 if "no slice" in text else int(text.split()[1])
        assert named.size and (named == expected).all() and expected != 1


def test_many_slices_are_checked_in_little_time():
    pieces = [((i, 0), (i + 1, 8)) for i in range(20_000)]
    manifests.check_tiling("a", (20_000, 8), pieces)  # the time limit of the test is the check


def test_only_what_is_asked_for_is_opened(tmp_path):
    def run(comm):
        return save(tmp_path, 1, comm, [Piece("a", np.full((2, 3), comm.rank), (2 * comm.rank, 0), (4, 3))], {})

    reader = Reader(run_threads(2, run)[0])
    (reader.folder / "model-00001-of-00002.safetensors").unlink()
    assert (reader.read("a", (0, 1), (2, 2)) == 0).all()
    with pytest.raises(UserError, match="model-00001-of-00002"):
        reader.read("a", (1, 1), (2, 2))


def test_out_may_be_strided_and_of_another_precision(tmp_path):
    reader = Reader(save_one(tmp_path, a=np.arange(12.0).reshape(3, 4), i=np.arange(3)))
    out = np.zeros((4, 3), np.float32)
    reader.read("a", out=out.T)
    assert np.array_equal(out.T, np.arange(12.0).reshape(3, 4))
    half = reader.read("a", (1, 0), (1, 4), np.zeros((1, 4), np.float16))
    assert half.tolist() == [[4, 5, 6, 7]]
    with pytest.raises(TypeError):
        reader.read("a", out=np.zeros((3, 4), np.int32))
    scalar = Reader(save_one(tmp_path, 2, s=np.float32(3).reshape(()))).read("s", out=np.zeros(()))
    assert scalar == 3


@pytest.mark.parametrize(
    ("start", "shape"), [((0,), (3, 4)), ((0, 0), (4, 4)), ((-1, 0), (1, 1)), ((0, 5), (1, 0)), ((0, 0), (-1, 1))]
)
def test_slices_outside_are_refused(tmp_path, start, shape):
    reader = Reader(save_one(tmp_path, a=np.zeros((3, 4))))
    with pytest.raises(ValueError, match="a: "):
        reader.read("a", start, shape)
    with pytest.raises(ValueError, match="out has the shape"):
        reader.read("a", out=np.zeros(4))


def test_a_name_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no tensor 'b'; it holds a"):
        Reader(save_one(tmp_path, a=np.zeros(3))).read("b")


def test_no_checkpoints(tmp_path):
    assert latest(tmp_path / "nothing") is None and latest(tmp_path) is None and scan(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot list the checkpoints"):
        latest(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        Reader(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"manifest.json: No such file"):
        Reader(tmp_path)


def test_names_of_another_model(tmp_path):
    reader = Reader(save_one(tmp_path, a=np.zeros((2, 3)), b=np.zeros(3, ml_dtypes.bfloat16)))
    good = {"a": ((2, 3), np.float64), "b": ([3], "bfloat16")}
    check_names(reader, good)
    check_names(reader, {**good, "b": ((3,), np.dtype(ml_dtypes.bfloat16))})
    cases = [
        ({**good, "c.weight": ((1,), "float32")}, "not in it: c.weight"),
        ({"a": good["a"]}, "only in it: b"),
        ({**good, "a": ((3, 2), np.float64)}, r"different: a is float64 \[2, 3\], not float64 \[3, 2\]"),
        ({**good, **{f"w{i}": ((1,), "int8") for i in range(9)}}, "not in it: w0, w1, w2, w3, w4 and 4 more"),
    ]
    for expected, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            check_names(reader, expected)
        assert "another model" in str(caught.value) and "layers: 4" in str(caught.value)
        assert str(reader.folder) in str(caught.value) and "another `name`" in str(caught.value)


def test_another_dtype_is_told_as_that(tmp_path):
    reader = Reader(save_one(tmp_path, a=np.zeros((2, 3)), b=np.zeros(3)))
    with pytest.raises(
        UserError, match=r"another dtype \(train.dtype\); different: a is float64 \[2, 3\], not float32"
    ):
        check_names(reader, {"a": ((2, 3), np.float32), "b": ((3,), np.float32)})


def test_another_optimizer_is_told_from_another_model(tmp_path):
    pieces = [Piece("a.w", np.zeros(1), (0,), (1,)), Piece("a.w.m", np.zeros(1), (0,), (1,), "optimizer")]
    state = {"model": {"kind": "gpt"}, "optimizer": {"kind": "sgd"}}
    reader = Reader(save(tmp_path, 1, single(), pieces, state))
    w, other = ((1,), np.float64), ((2,), np.float64)
    cases = {
        "optimizer": [{"a.w": w}, {"a.w": w, "a.w.x": w}, {"a.w": w, "a.w.m": other}, {"a.w": w, "a.w.m.row": w}],
        "model": [{"a.w": other, "a.w.m": w}, {"a.w": w, "a.w.m": w, "a.w2": w}, {"a.w.m": w}, {}],
    }
    for word, all_expected in cases.items():
        for expected in all_expected:
            with pytest.raises(UserError, match=f"another {word}: it holds .*{state[word]['kind']}"):
                check_names(reader, expected)


def test_checksums_are_computed_once_per_slice(tmp_path, monkeypatch):
    reader = Reader(save_one(tmp_path, a=np.arange(5.0), b=np.arange(2)))
    keys = []
    crc32 = Mapped.crc32
    monkeypatch.setattr(Mapped, "crc32", lambda self, key: (keys.append(key), crc32(self, key))[1])
    for _ in range(2):
        reader.tensor("a")
    assert keys == ["a"]
    reader.verify()
    assert keys == ["a", "b"]


def test_arrays_of_all_widths_are_aligned_in_the_file(tmp_path):
    arrays = {f"{name}{n}": np.ones(n, name) for name in ("int8", "float64", "int16", "float32") for n in (1, 3, 5)}
    mapped = Mapped(save_one(tmp_path, **arrays) / SHARD)
    assert all(mapped.array(name).flags.aligned and (mapped.array(name) == 1).all() for name in arrays)
    assert all(mapped.entries[name][2] % array.itemsize == 0 for name, array in arrays.items())


def test_names_by_kind(tmp_path):
    pieces = [Piece("a", np.zeros(1), (0,), (1,)), Piece("a.m", np.zeros(1), (0,), (1,), "optimizer")]
    reader = Reader(save(tmp_path, 1, single(), pieces, {}))
    assert (reader.names(), reader.names("parameter"), reader.names("optimizer")) == (["a", "a.m"], ["a"], ["a.m"])
    assert reader.entry("a").shape == (1,) and reader.entry("a").dtype == "float64"
    assert reader.tensor("a").tolist() == [0]
