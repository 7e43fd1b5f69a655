"""Reading: any slice from any shards, nothing damaged believed, the newest complete one found."""

import itertools
import json
import logging
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrain import manifest as manifests
from dtrain.checkpoint import Piece, Reader, check_names, latest, save, scan
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.safetensors_file import FormatError, Mapped

SHARD = "model-00000-of-00001.safetensors"


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Forcing each of hundreds of small files to the disk tests the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save_one(root, step=1, **arrays):
    pieces = [Piece(name, array, (0,) * array.ndim, array.shape) for name, array in arrays.items()]
    return save(root, step, single(), pieces, {"step": step, "model": {"kind": "gpt", "layers": 4}})


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


def test_every_damaged_byte_is_found(tmp_path):
    folder = save_one(tmp_path, a=np.arange(5.0), b=np.arange(3, dtype=np.int8))
    content = (folder / SHARD).read_bytes()
    assert Reader(folder).verify() == len(content)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        (folder / SHARD).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{SHARD}"):
            Reader(folder).verify()


def test_a_damaged_tensor_is_named_when_read_and_the_others_are_given(tmp_path):
    folder = save_one(tmp_path, a=np.arange(5.0), b=np.arange(3.0))
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1  # of b
    (folder / SHARD).write_bytes(content)
    reader = Reader(folder)
    assert reader.read("a").tolist() == [0, 1, 2, 3, 4]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{SHARD}: b\[0:3\] does not have the checksum"):
            reader.read("b", (0,), (1,))


def damage_missing(folder):
    (folder / SHARD).unlink()


def damage_truncated(folder):
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[:-1])


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_manifest(folder):
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(content[: len(content) // 2])


def damage_empty_manifest(folder):
    (folder / "manifest.json").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "No such file"),
        (damage_truncated, "bytes instead of"),
        (damage_no_manifest, "No such file"),
        (damage_manifest, "not the manifest"),
        (damage_empty_manifest, "not the manifest"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_reason(tmp_path, damage, reason, caplog):
    older = save_one(tmp_path, 1, a=np.arange(5.0))
    newer = save_one(tmp_path, 2, a=np.arange(5.0))
    assert latest(tmp_path) == newer
    damage(newer)
    warnings = []
    assert latest(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and str(newer) in warnings[0] and reason in warnings[0]
    with caplog.at_level(logging.WARNING, "dtrain"):
        assert latest(tmp_path) == older
    assert reason in caplog.text
    assert [found.problem for found in scan(tmp_path) if found.folder == older] == [None]
    assert reason in next(found.problem for found in scan(tmp_path) if found.folder == newer)
    with pytest.raises(UserError, match=reason):
        Reader(newer)
    damage(older)
    assert latest(tmp_path, warnings.append) is None


def test_no_checkpoints(tmp_path):
    assert latest(tmp_path / "nothing") is None and latest(tmp_path) is None and scan(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot list the checkpoints"):
        latest(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder"):
        Reader(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"manifest.json: No such file"):
        Reader(tmp_path)


def changed(folder, change):
    """The folder with its manifest changed."""
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))
    return folder


def set_file(name):
    def change(table):
        table["files"][name] = table["files"].pop(SHARD)
        table["tensors"]["a"]["slices"][0]["file"] = name

    return change


def set_slice(**values):
    return lambda table: table["tensors"]["a"]["slices"][0].update(values)


def set_tensor(**values):
    return lambda table: table["tensors"]["a"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_file("/etc/passwd"), "plain name"),
        (set_file("../other.safetensors"), "plain name"),
        (set_file("sub/x.safetensors"), "plain name"),
        (set_file("..safetensors"), "plain name"),
        (set_file("sub\\x.safetensors"), "plain name"),
        (set_file("x.safetensors\n"), "plain name"),
        (set_file("manifest.json"), "plain name"),
        (set_slice(file="other.safetensors"), "not among the files"),
        (set_slice(start=[1]), "outside"),
        (set_slice(start=[-1]), "start"),
        (set_slice(shape=[4]), r"no slice has \[4:5\]"),
        (set_slice(shape=[5, 1]), "dims"),
        (set_slice(shape=["5"]), "shape"),
        (set_slice(shape=[2**62, 4]), "dims"),
        (set_slice(more=1), "more"),
        (set_slice(crc32=None), "crc32"),
        (set_tensor(slices=[]), r"no slice has \[0:5\]"),
        (set_tensor(dtype="float31"), "float31.*known"),
        (set_tensor(dtype="float32"), "bytes, but header and slices"),
        (set_tensor(dtype="object"), "known"),
        (set_tensor(kind="gradient"), "kind"),
        (set_tensor(shape=[6]), r"no slice has \[5:6\]"),
        (lambda table: table["tensors"]["a"]["slices"].append(table["tensors"]["a"]["slices"][0]), "2 slices have"),
        (lambda table: table["files"][SHARD].update(bytes=3), "bytes, but header and slices"),
        (
            lambda table: table["files"].update({"y.safetensors": {"bytes": 9, "header_bytes": 8, "header_crc32": 0}}),
            "y",
        ),
        (lambda table: table.update(version=2), "newer dtrain"),
        (lambda table: table.update(format="zip"), "format"),
        (lambda table: table.pop("state"), "state"),
        (lambda table: table.update(state=[]), "state"),
        (lambda table: table.update(extra=1), "extra"),
        (lambda table: table.clear(), "format"),
    ],
)
def test_a_manifest_is_not_believed(tmp_path, change, message):
    folder = changed(save_one(tmp_path, a=np.arange(5.0)), change)
    with pytest.raises(UserError, match=message) as caught:
        Reader(folder)
    assert str(folder / "manifest.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'{"state":' + b"[" * 10**5, b"{}"])
def test_a_manifest_may_be_anything(tmp_path, content):
    folder = save_one(tmp_path, a=np.arange(5.0))
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Reader(folder)
    assert latest(tmp_path, lambda text: None) is None


def test_a_slice_that_the_file_has_differently(tmp_path):
    folder = changed(save_one(tmp_path, a=np.arange(5.0)), set_slice(key="b"))
    with pytest.raises(UserError, match=r"has no 'b' of float64 \[5\]"):
        Reader(folder).read("a")
    folder = changed(save_one(tmp_path, 2, a=np.arange(5.0)), set_tensor(dtype="int64"))
    with pytest.raises(UserError, match="has no 'a' of int64"):
        Reader(folder).read("a")


def test_a_shard_of_another_checkpoint_of_the_same_size_is_found(tmp_path):
    one, two = save_one(tmp_path, 1, a=np.zeros(5)), save_one(tmp_path, 2, a=np.ones(5))
    shutil.copy(one / SHARD, two / SHARD)
    with pytest.raises(UserError, match="checksum"):
        Reader(two).read("a")


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"1234567",
        (2**63).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{x",
        (8).to_bytes(8, "little") + b'{"a":1 }',
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_a_shard_may_be_anything(tmp_path, head):
    """Also when the manifest agrees with it on the sizes."""
    folder = save_one(tmp_path, a=np.arange(5.0))
    (folder / SHARD).write_bytes(head)

    def agree(table):
        table["tensors"].clear()
        table["files"][SHARD].update(bytes=len(head), header_bytes=len(head))

    with pytest.raises(UserError, match=SHARD):
        Reader(changed(folder, agree)).verify()


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


def test_a_header_that_says_the_same_in_other_bytes_is_found(tmp_path):
    folder = save_one(tmp_path, a=np.arange(5.0))
    content = (folder / SHARD).read_bytes()
    assert b": " not in content and content.count(b"} ") == 1  # padding
    (folder / SHARD).write_bytes(content.replace(b"} ", b"}\n"))
    with pytest.raises(UserError, match="header does not have the checksum"):
        Reader(folder).verify()


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


def shard(size, row, data=b"\0" * 24):
    text = b'{"a":' + row + b"}"
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        shard(100, b"1", b""),
        shard(None, b'{"dtype":"F32","shape":[6],"data_offsets":[0,24]}', b"\0" * 23),
        shard(None, b'{"dtype":"F32","shape":[5],"data_offsets":[0,24]}'),
        shard(None, b'{"dtype":"F32","shape":[6],"data_offsets":[-4,20]}'),
        shard(None, b'{"dtype":"F32","shape":[-1,-6],"data_offsets":[0,24]}'),
        shard(None, b'{"dtype":"F32","shape":[6.0],"data_offsets":[0,24]}'),
        shard(None, b'{"dtype":"F32","shape":[6],"data_offsets":[0.0,24.0]}'),
        shard(None, b'{"dtype":"F32","shape":[6],"data_offsets":[0]}'),
        shard(None, b'{"dtype":"F31","shape":[6],"data_offsets":[0,24]}'),
        shard(None, b'{"shape":[6],"data_offsets":[0,24]}'),
        shard(10, b"1" * 20 + b"   ", b"")[:10],
        (50).to_bytes(8, "little") + b"{}",
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        Mapped(tmp_path / "x.safetensors")


def test_names_by_kind(tmp_path):
    pieces = [Piece("a", np.zeros(1), (0,), (1,)), Piece("a.m", np.zeros(1), (0,), (1,), "optimizer")]
    reader = Reader(save(tmp_path, 1, single(), pieces, {}))
    assert (reader.names(), reader.names("parameter"), reader.names("optimizer")) == (["a", "a.m"], ["a"], ["a.m"])
    assert reader.entry("a").shape == (1,) and reader.entry("a").dtype == "float64"
    assert reader.tensor("a").tolist() == [0]
