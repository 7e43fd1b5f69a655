"""Saving: what lands on the disk, who writes it, and what is removed for it."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dtrain import checkpoint_folder, safetensors_file
from dtrain.checkpoint import Piece, Reader, latest, save, scan
from dtrain.collectives import run_threads, single
from tests.checkpoints import replicated, save_one, visible, whole

pytestmark = pytest.mark.usefixtures("fast_disk")

DTYPES = [*(name for name in safetensors_file.CODES if name != "bfloat16"), ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    octets = np.random.default_rng(0).integers(0, 256, (6, 8 * 5), np.uint8)
    array = (octets % 2).astype(bool) if dtype == "bool" else octets.view(dtype)  # NaNs and all
    arrays = {
        "array": array,
        "column": array[:, 1:3],
        "scalar": array[2, 3].reshape(()),
        "empty": array[:0],
        "transposed": array.T,
    }
    folder = save_one(tmp_path, **arrays)
    reader = Reader(folder)
    for name, expected in arrays.items():
        found = reader.read(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert found.tobytes() == expected.tobytes(), name


def test_big_endian_arrays_are_stored_as_the_format_says(tmp_path):
    array = np.arange(5, dtype=">f4")
    assert np.array_equal(Reader(save_one(tmp_path, a=array)).read("a"), array)


def test_strided_arrays_larger_than_a_chunk_are_written_in_row_major_order():
    base = np.random.default_rng(0).integers(0, 255, (5, 700, 900), np.uint8)
    for array in (base, base.T, base[:, ::3], base[:, :, 1:], base[::2, 5:6], base.transpose(1, 0, 2)):
        found = b"".join(safetensors_file.blocks(array))
        assert found == array.tobytes()
        assert max(map(len, safetensors_file.blocks(array))) <= safetensors_file.CHUNK


def test_contiguous_arrays_are_not_copied():
    array = np.zeros((300, 1000), np.float32)
    assert all(np.shares_memory(array, np.frombuffer(block, np.uint8)) for block in safetensors_file.blocks(array))


def test_the_library_reads_the_files(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.arange(3, dtype=np.int8), "ü": np.float16(2).reshape(())}
    folder = save_one(tmp_path, **arrays)
    found = safetensors.numpy.load_file(folder / "model-00000-of-00001.safetensors")
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) and found[name].shape == arrays[name].shape for name in arrays)


def test_files_of_the_library_are_read(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.arange(3, dtype=np.int8), "e": np.zeros((0, 2), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    mapped = safetensors_file.Mapped(tmp_path / "x.safetensors")
    assert mapped.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(mapped.array(name), array) and mapped.array(name).dtype == array.dtype


def test_what_all_ranks_hold_is_written_once_and_by_all(tmp_path):
    assert {*run_threads(4, replicated, tmp_path)} == {tmp_path / "step_00000001"}
    manifest = Reader(tmp_path / "step_00000001").manifest
    assert all(len(tensor.slices) == 1 for tensor in manifest.tensors.values())
    assert len(manifest.files) == 4
    sizes = [file.bytes - file.header_bytes for file in manifest.files.values()]
    assert sum(sizes) == sum(30 * (10 + i) * 4 for i in range(8))
    assert max(sizes) - min(sizes) <= 30 * 17 * 4  # never apart by more than the largest piece


def test_pieces_without_a_choice_are_balanced_by_those_with_one(tmp_path):
    def run(comm):
        own = np.zeros(1000 if comm.rank == 0 else 10, np.uint8)
        start = 0 if comm.rank == 0 else 1000 + 10 * (comm.rank - 1)
        shared = [whole(f"shared{i}", np.zeros(300, np.uint8)) for i in range(6)]
        return save(tmp_path, 1, comm, [Piece("own", own, (start,), (1020,)), *shared], {})

    manifest = Reader(run_threads(3, run)[0]).manifest
    assert sorted(file.bytes - file.header_bytes for file in manifest.files.values()) == [910, 910, 1000]


def test_a_small_piece_without_a_choice_is_placed_before_large_ones_with_one(tmp_path):
    def run(comm):
        own = [whole("own", np.zeros(100, np.uint8))] if comm.rank == 0 else []
        shared = [whole("large", np.zeros(300, np.uint8)), whole("less", np.zeros(250, np.uint8))]
        return save(tmp_path, 1, comm, [*own, *shared], {})

    manifest = Reader(run_threads(2, run)[0]).manifest
    assert [file.bytes - file.header_bytes for file in manifest.files.values()] == [350, 300]


def test_ranks_with_nothing_write_nothing(tmp_path):
    def run(comm):
        empty = Piece("a", np.zeros((0, 3)), (4, 0), (4, 3))
        return save(tmp_path, 1, comm, [whole("a", np.ones((4, 3)))] if comm.rank == 1 else [empty], {})

    folder = run_threads(3, run)[0]
    assert visible(folder) == ["manifest.json", "model-00000-of-00001.safetensors"]
    assert np.array_equal(Reader(folder).read("a"), np.ones((4, 3)))


def test_a_checkpoint_without_tensors(tmp_path):
    folder = save_one(tmp_path)
    assert Reader(folder).names() == [] and Reader(folder).verify() == 0 and latest(tmp_path) == folder


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (lambda rank: Piece("w", np.zeros((2, 3)), (rank, 0), (3, 3)), r"w: 2 slices have \[1:2,0:3\]"),
        (lambda rank: Piece("w", np.zeros((2, 3)), (rank * 3, 0), (5, 3)), r"w: no slice has \[2:3,0:3\]"),
        (lambda rank: Piece("w", np.zeros((2, 3)), (rank * 2, 0), (3, 3)), r"w: the slice \[2:4,0:3\] is .*outside"),
        (lambda rank: Piece("w", np.zeros(2), (rank * 2,), (4 + rank,)), r"w is .* \(4,\)\) on rank 0, .* on rank 1"),
        (lambda rank: Piece("w", np.zeros(2, f"f{4 + 4 * rank}"), (2 * rank,), (4,)), "float32.*rank 0.*float64"),
        (lambda rank: Piece("w", np.zeros(2), (0, 0), (2,)), "w on rank 0"),
        (lambda rank: Piece("w", np.zeros((1, 2)), (0,), (2,)), "w on rank 0"),
        (lambda rank: Piece("w", np.zeros(2, "M8[s]"), (0,), (2,)), "w on rank 0.*datetime64"),
        (lambda rank: Piece("w", np.zeros(2), (0,), (2,), "gradient"), "w on rank 0.*gradient"),
    ],
)
def test_pieces_that_do_not_fit_are_refused_on_all_ranks(tmp_path, pieces, message):
    def run(comm):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "root", 1, comm, [pieces(comm.rank)], {})

    run_threads(2, run)
    assert visible(tmp_path) == []


def test_a_piece_handed_in_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rank 0 hands in w"):
        save(tmp_path, 1, single(), [whole("w", np.zeros(2))] * 2, {})


@pytest.mark.parametrize("state", [{"x": np.float32(1)}, {"x": float("nan")}, {"x": b""}])
def test_a_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path, state):
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path / "root", 1, single(), [], state)
    assert visible(tmp_path) == []


def test_keep_removes_the_oldest_and_only_after_the_new_one_is_there(tmp_path, monkeypatch):
    there = []
    prune = checkpoint_folder.SharedFolder.prune
    monkeypatch.setattr(
        checkpoint_folder.SharedFolder, "prune", lambda self, keep: (there.append(visible(tmp_path)), prune(self, keep))
    )
    for step in (10, 20, 30, 40):
        save_one(tmp_path, step, keep=2, a=np.arange(step))
    assert visible(tmp_path) == ["step_00000030", "step_00000040"]
    assert there[-1] == ["step_00000020", "step_00000030", "step_00000040"]
    save_one(tmp_path, 50, keep=0, a=np.arange(50))
    assert len(visible(tmp_path)) == 3
    save_one(tmp_path, 60, keep=1, a=np.arange(60))
    assert visible(tmp_path) == ["step_00000060"]


def test_the_newest_is_the_one_written_last_whatever_its_step(tmp_path):
    for step in (100, 200, 300, 50):  # started anew in the folder of an older run
        save_one(tmp_path, step, keep=2, a=np.arange(step))
    assert visible(tmp_path) == ["step_00000050", "step_00000300"]
    assert latest(tmp_path) == tmp_path / "step_00000050"


def test_the_same_step_again_replaces_it(tmp_path):
    save_one(tmp_path, 5, a=np.zeros(3))
    folder = save_one(tmp_path, 5, a=np.ones(4), b=np.ones(1))
    assert visible(tmp_path) == ["step_00000005"]
    assert Reader(folder).read("a").tolist() == [1, 1, 1, 1]


def test_leftovers_are_removed_and_what_is_not_ours_stays(tmp_path):
    (tmp_path / ".step_00000001.partial").mkdir()
    (tmp_path / ".step_00000001.partial" / "model-00000-of-00001.safetensors").write_bytes(b"x")
    (tmp_path / ".step_00000002.removed").mkdir()
    for name in ("notes", "step_x", "step_1", ".git"):
        (tmp_path / name).mkdir()
    save_one(tmp_path, 3, keep=1, a=np.zeros(3))
    save_one(tmp_path, 4, keep=1, a=np.zeros(3))
    assert visible(tmp_path) == [".git", "notes", "step_00000004", "step_1", "step_x"]


def test_two_runs_do_not_mix(tmp_path):
    save_one(tmp_path / "one", 1, keep=1, a=np.zeros(3))
    save_one(tmp_path / "two", 2, keep=1, a=np.ones(3))
    assert [scan(tmp_path / run)[0].serial for run in ("one", "two")] == [1, 1]
    assert Reader(latest(tmp_path / "one")).read("a").tolist() == [0, 0, 0]
    assert latest(tmp_path / "two").name == "step_00000002"


def test_the_manifest_says_everything(tmp_path):
    folder = save(tmp_path, 7, single(), [whole("a.m", np.zeros((2, 3)), "optimizer")], {"step": 7, "seed": 1})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tensors"]["a.m"] == {
        "kind": "optimizer",
        "dtype": "float64",
        "shape": [2, 3],
        "slices": [
            {
                "file": "model-00000-of-00001.safetensors",
                "key": "a.m",
                "start": [0, 0],
                "shape": [2, 3],
                "crc32": manifest["tensors"]["a.m"]["slices"][0]["crc32"],
            }
        ],
    }
    assert manifest["state"] == {"step": 7, "seed": 1} and manifest["ranks"] == 1
    assert manifest["versions"].keys() == {"dtrain", "numpy", "python"}


def test_importing_it_is_cheap():
    program = (
        "import sys, dtrain.checkpoint; print({'safetensors', 'ml_dtypes', 'mpi4py.MPI', 'yaml'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
