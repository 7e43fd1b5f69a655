"""Reading what is damaged: no byte of it is believed, and the newest complete checkpoint is found."""

import json
import logging
import shutil

import numpy as np
import pytest

from dtrain.checkpoint import Reader, latest, scan
from dtrain.collectives import single
from dtrain.errors import UserError
from dtrain.launch.run_folder import RunFolder
from dtrain.safetensors_file import FormatError, Mapped
from tests.checkpoints import SHARD, save_one
from tests.training import trainer

pytestmark = pytest.mark.usefixtures("fast_disk")


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


def test_a_header_that_says_the_same_in_other_bytes_is_found(tmp_path):
    folder = save_one(tmp_path, a=np.arange(5.0))
    content = (folder / SHARD).read_bytes()
    assert b": " not in content and content.count(b"} ") == 1  # padding
    (folder / SHARD).write_bytes(content.replace(b"} ", b"}\n"))
    with pytest.raises(UserError, match="header does not have the checksum"):
        Reader(folder).verify()


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


def test_a_run_goes_on_only_from_what_tells_its_step(tmp_path):
    """A checkpoint made elsewhere has the tensors, and whatever state its maker knew."""
    ours = trainer(single(), train={"steps": 1, "global_batch": 2, "micro_batch": 2})
    folder = ours.save(tmp_path)
    whole = json.loads((folder / "manifest.json").read_text())
    for key, change, problem in (
        ("step", {}, r"state.step: None; .* a whole number"),
        ("consumed", {"consumed": "many"}, r"state.consumed: 'many'"),
        ("optimizer", {"optimizer": 3}, r"state.optimizer.steps: None"),
    ):
        state = {name: value for name, value in whole["state"].items() if name != key} | change
        (folder / "manifest.json").write_text(json.dumps({**whole, "state": state}))
        with pytest.raises(UserError, match=problem):
            ours.load(folder)


def test_a_run_tells_where_the_checkpoint_does_not_know_its_data(tmp_path):
    run = RunFolder(tmp_path / "test", trainer(single(), train={"steps": 1, "global_batch": 2, "micro_batch": 2}))
    folder = run.trainer.save(run.checkpoints)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["state"]["seed"], manifest["state"]["data"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told = run.open(tmp_path / "test.yaml")
    assert "note: seed is 3 now, was not told" in told[1] and "the data is not what" in told[2]
