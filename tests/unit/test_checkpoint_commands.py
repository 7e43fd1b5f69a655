"""`dtrain checkpoint ls | verify | diff | export`, as a user calls them."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dtrain.checkpoint import Piece, save
from dtrain.collectives import run_threads, single
from dtrain.errors import UserError
from dtrain.launch import checkpoints
from dtrain.launch.main import run

SHARD = "model-00000-of-00001.safetensors"


def save_one(root, step=1, state=None, **arrays):
    pieces = [Piece(name, array, (0,) * array.ndim, array.shape) for name, array in arrays.items()]
    return save(root, step, single(), pieces, state or {"step": step, "model": {"kind": "gpt"}})


def command(*arguments):
    """Exit code of `dtrain checkpoint ...`."""
    try:
        run(["checkpoint", *map(str, arguments)])
    except SystemExit as leaving:
        return leaving.code
    return 0


def test_ls(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    save_one(root, 5, a=np.zeros(300_000, np.float32))
    damaged = save_one(root, 10, a=np.zeros(3))
    (damaged / SHARD).unlink()
    for folder in (tmp_path / "run", root):
        assert command("ls", folder) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["step", "size", "age", "state"]
        assert lines[1].split() == ["5", "1.2", "MB", "0", "s", "complete"] or lines[1].split()[-1] == "complete"
        assert lines[2].split()[0] == "10" and f"damaged: {SHARD}: No such file" in lines[2]
    (tmp_path / "new").mkdir()
    assert command("ls", tmp_path / "new") == 0 and "no checkpoints" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        command("ls", tmp_path / "nowhere")


def test_sizes_and_ages_are_told_in_units_people_use():
    sizes = {0: "0 B", 999: "999 B", 1000: "1.0 kB", 1.25e6: "1.2 MB", 3e9: "3.0 GB", 2.5e15: "2500.0 TB"}
    assert {n: checkpoints._size(n) for n in sizes} == sizes
    ages = {-1: "0 s", 119: "119 s", 120: "2 min", 7300: "2 h", 200_000: "2 d", float("nan"): "?"}
    assert [checkpoints._age(n) for n in ages] == [*ages.values()]


def test_verify(tmp_path, capsys):
    folder = save_one(tmp_path / "run" / "checkpoints", a=np.arange(100.0))
    for path in (folder, tmp_path / "run"):
        assert command("verify", path) == 0
        assert "all checksums right" in capsys.readouterr().out
    content = bytearray((folder / SHARD).read_bytes())
    content[-5] ^= 1
    (folder / SHARD).write_bytes(content)
    with pytest.raises(UserError, match=r"a\[0:100\] does not have the checksum"):
        command("verify", folder)
    with pytest.raises(UserError, match="no such folder"):
        command("verify", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"manifest\.json"):
        command("verify", folder.parent.parent.parent)


def test_diff_does_not_mind_the_layout(tmp_path, capsys):
    array = np.random.default_rng(0).standard_normal((6, 4))

    def save_rows(comm):
        start = 2 * comm.rank
        return save(tmp_path / "b", 1, comm, [Piece("a", array[start : start + 2], (start, 0), (6, 4))], {})

    one, two = save_one(tmp_path / "a", a=array), run_threads(3, save_rows)[0]
    assert command("diff", one, two) == 0
    assert "1 tensors equal, 0 different" in capsys.readouterr().out


def test_diff_tells_what_differs(tmp_path, capsys):
    same = np.array([1, np.nan, np.inf])
    one = {"s": same, "v": np.array([1.0, 2, 3]), "t": np.zeros(3), "gone": np.zeros(1), "d": np.zeros(1)}
    two = {"s": same, "v": np.array([1.0, 2, 3.5]), "t": np.zeros((3, 1)), "new": np.zeros(1), "d": np.zeros(1, "f4")}
    assert command("diff", save_one(tmp_path / "a", 1, **one), save_one(tmp_path / "b", 2, **two)) == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-1] == "1" and lines[1][-1] == "2"
    rows = {line[0]: " ".join(line[1:]) for line in lines[2:-1]}
    assert rows == {
        "v": "float64 [3] largest difference 0.5",
        "t": "A has float64 [3], B float64 [3, 1]",
        "gone": "only in A",
        "d": "A has float64 [1], B float32 [1]",
        "new": "only in B",
    }
    assert " ".join(lines[-1]) == "1 tensors equal, 5 different"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, np.nan], [1.0, np.nan], (True, 0)),
        ([1.0, np.nan], [1.0, 2.0], (False, np.nan)),
        ([np.inf, 1.0], [np.inf, 1.5], (False, 0.5)),
        ([np.inf], [-np.inf], (False, np.inf)),
        ([0.0], [-0.0], (True, 0)),
        (np.array([2**63], np.uint64), np.array([1], np.uint64), (False, 2.0**63)),
        (np.array([-128], np.int8), np.array([127], np.int8), (False, 255)),
        (np.array([True, False]), np.array([True, True]), (False, 1)),
        (np.array([1, 2], ml_dtypes.bfloat16), np.array([1, 2.5], ml_dtypes.bfloat16), (False, 0.5)),
        (np.float32(1).reshape(()), np.float32(3).reshape(()), (False, 2)),
        (np.zeros((0, 2)), np.zeros((0, 2)), (True, 0)),
    ],
)
def test_compare(a, b, expected):
    found = checkpoints.compare(np.asarray(a), np.asarray(b))
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1], equal_nan=True)


def test_compare_looks_at_every_block():
    a = np.zeros(3 * checkpoints._BLOCK + 5, np.float32)
    for place, value in ((0, 1), (checkpoints._BLOCK, 2), (-1, 3), (5, np.nan), (-2, 9)):
        b = a.copy()
        b[place] = value
        assert checkpoints.compare(a, b)[0] is False
    a[5], a[-1] = np.nan, 1  # a NaN is not forgotten in later blocks
    assert np.isnan(checkpoints.compare(a, np.zeros_like(a))[1])


def test_export_is_read_by_the_library(tmp_path, capsys):
    array = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)

    def save_columns(comm):
        start = 2 * comm.rank
        part = array[:, start : start + 2]
        pieces = [Piece("w", part, (0, start), (6, 4)), Piece("w.m", part, (0, start), (6, 4), "optimizer")]
        return save(tmp_path / "a", 1, comm, pieces, {"step": 1, "model": {"kind": "gpt", "layers": 2}})

    folder = run_threads(2, save_columns)[0]
    assert command("export", folder, tmp_path / "out" / "deep") == 0
    assert "model.safetensors: 1 tensors" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["deep"]
    found = safetensors.numpy.load_file(tmp_path / "out" / "deep" / "model.safetensors")
    assert found.keys() == {"w"} and np.array_equal(found["w"], array)
    config = json.loads((tmp_path / "out" / "deep" / "config.json").read_text())
    assert config["model"] == {"kind": "gpt", "layers": 2} and config["step"] == 1


def test_export_overwrites_nothing(tmp_path, capsys):
    folder = save_one(tmp_path / "a", w=np.zeros(3), e=np.zeros((0, 2)))
    (tmp_path / "empty").mkdir()
    assert command("export", folder, tmp_path / "empty") == 0
    before = (tmp_path / "empty" / "model.safetensors").read_bytes()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(UserError, match="exists already"):
            command("export", folder, out)
    with pytest.raises(UserError, match="cannot export: Not a directory"):
        command("export", folder, tmp_path / "file" / "below")
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    folder = save_one(tmp_path / "a", w=np.zeros(3))
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)
    with pytest.raises(UserError, match="checksum"):
        command("export", folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_from_the_shell(tmp_path):
    """The exit codes: 0 equal, 1 different, 2 a mistake."""
    one, two = save_one(tmp_path / "a", w=np.zeros(3)), save_one(tmp_path / "b", w=np.ones(3))
    codes = []
    for arguments in (["diff", one, one], ["diff", one, two], ["diff", one, tmp_path / "c"]):
        line = [sys.executable, "-m", "dtrain.launch", "checkpoint", *map(str, arguments)]
        codes.append(subprocess.run(line, capture_output=True, text=True, timeout=60).returncode)
    assert codes == [0, 1, 2]
