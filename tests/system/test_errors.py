"""Mistakes of the user: one message that names file, key, value and what is allowed; exit code 2; no traceback."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.system import program
from tests.system.program import MPIRUN, Process, dtrain, needs_mpirun, well, write_config

pytestmark = [pytest.mark.timeout(300)]
RANKS = 2 if MPIRUN else 0
SOON = 40  # seconds, on a loaded machine; the message stands there after one


def told(ended: program.Ended, *words: str) -> str:
    """Assert that the process ended by one message with these words, and return it."""
    message = ended.words.strip("\n")
    assert ended.code == 2, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    assert message.count("dtrain: error: ") == 1 and message.startswith("dtrain: error: "), message
    assert "Traceback" not in ended.out + ended.err
    for word in words:
        assert word in message, f"{word} is not in: {message}"
    assert ended.seconds < SOON
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors")


@pytest.fixture(scope="module")
def config(folder: Path, text: Path) -> Path:
    return write_config(folder, text)


RATE = ("optimizer.learning_rte=1", ["optimizer.learning_rte", "unknown", "did you mean learning_rate?"])
BATCH = ("train.global_batch=25", ["train.global_batch: 25", "multiple", "27"])


@pytest.mark.parametrize(
    ("ranks", "override", "words"),
    [
        (0, *RATE),
        (0, *BATCH),
        (0, "train.steps=ten", ["train.steps", "'ten'", "whole number"]),
        pytest.param(3, *RATE, marks=needs_mpirun),  # before there are ranks
        pytest.param(3, *BATCH, marks=needs_mpirun),  # by all of them
    ],
)
def test_wrong_keys_and_values(config, ranks, override, words):
    message = told(dtrain("run", config, override, ranks=ranks), *words)
    assert "\n" not in message


def test_a_wrong_key_in_the_file_is_told_with_its_line(folder, text):
    path = write_config(folder, text, name="line")
    path.write_text(path.read_text().replace("learning_rate", "learning_rte"))
    line = 1 + [word.strip() for word in path.read_text().splitlines()].index("learning_rte: 0.01")
    told(
        dtrain("run", path, ranks=RANKS), f"{path}, line {line}: optimizer.learning_rte", "did you mean learning_rate?"
    )


def test_several_mistakes_are_one_message(config):
    message = told(dtrain("run", config, "train.steps=x", "model.layers=0.5", "sed=3"), "train.steps", "model.layers")
    assert "sed" in message and "did you mean seed?" in message


@needs_mpirun
def test_a_mesh_that_does_not_fit(config):
    told(dtrain("run", config, "parallel.dp=3", ranks=2), "parallel.dp: 3", "2", "-1")


# What the configuration alone shows, before there are ranks; test_wrong_keys_and_values is on three as well.
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps", ["'train.steps'", "key.path=value"]),
        ("=5", ["'=5'", "key.path=value"]),
        ("train.steps=[1", ["train.steps=[1", "YAML"]),
        ("name.x=1", ["name.x=1", "name is 'small'"]),
        ("model.kind=gtp", ["model.kind", "gtp", "did you mean gpt?"]),
        ("model.heads=5", ["model.heads: 5", "divide", "4"]),
        ("train.dtype=float23", ["train.dtype", "float23", "did you mean float"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "-1", "0 or more"]),
        ("name=a/b", ["name: a/b"]),
    ],
)
def test_overrides(config, override, words):
    told(dtrain("run", config, override), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vocabulary=100", ["model.vocabulary: 100", "256", "argparse.py"]),
        ("data.path=nowhere.txt", ["data.path: nowhere.txt", "no "]),
        ("output=/dev/null", ["output", "/dev/null"]),
        ("checkpoint.resume=nowhere", ["nowhere", "checkpoint"]),
        ("data.tokenizer=bpe=", ["data.tokenizer", "bpe"]),
    ],
)
def test_overrides_that_do_not_fit_the_machine(config, override, words):
    told(dtrain("run", config, override, ranks=RANKS), *words)


@pytest.mark.parametrize("ranks", [0, pytest.param(3, marks=needs_mpirun)])
def test_a_missing_configuration(folder, config, ranks):
    told(dtrain("run", "smal.yaml", ranks=ranks, cwd=folder), "smal.yaml", "no such file", "small.yaml")


def test_files_that_are_no_configuration(folder):
    for name, content, word in [
        ("empty", b"", "is empty"),
        ("bytes", b"\xff\xfe\0", "not a text"),
        ("list", b"- 1", "1"),
    ]:
        (folder / name).write_bytes(content)
        told(dtrain("run", folder / name), name, word)
    (folder / "broken.yaml").write_text("model: {kind: gpt\ntrain: 5")
    told(dtrain("run", folder / "broken.yaml"), "broken.yaml, line 2")
    told(dtrain("run", folder), str(folder), "folder")


@pytest.mark.parametrize(("content", "word"), [("", "no text"), ("too short", "model.sequence: 16")])
def test_empty_and_short_text(folder, config, content, word):
    path = folder / "few.txt"
    path.write_text(content)
    told(dtrain("run", config, f"data.path={path}", ranks=RANKS), "data.path", str(path), word)


def test_an_empty_folder(folder, config):
    (folder / "nothing").mkdir()
    told(dtrain("run", config, f"data.path={folder / 'nothing'}"), "data.path", "no files")
    told(dtrain("run", config, f"data.path={folder / 'nothing'}/*.txt"), "data.path", "no file matches")


def test_an_unreadable_text(folder, config):
    path = folder / "locked.txt"
    path.write_text("text " * 1000)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything, but not this
        path = Path("/proc/self/mem")
        if not path.exists():
            pytest.skip("root can read every file here")
    told(dtrain("run", config, f"data.path={path}", ranks=RANKS), "data.path", str(path), "cannot read")


def test_images_that_are_none(folder, config):
    path = folder / "images.npz"
    path.write_bytes(b"PK not a zip file")
    job = ["model={kind: mlp}", f"data={{kind: images, path: {path}}}"]
    told(dtrain("run", config, *job), "data.path", str(path))


def test_text_for_a_classifier(config):
    told(dtrain("run", config, "model={kind: mlp}"), "data.kind: text", "images")


# --- what stands in the way on the disk -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(folder: Path, config: Path) -> Path:
    """The folder of a run with a checkpoint."""
    well("run", config, "name=trained", "train.steps=2")
    return folder / "runs" / "trained"


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("model.dim=64", "blocks.0"),
        ("model.layers=2", "blocks.1"),
        ("optimizer={kind: sgd, learning_rate: 0.1}", "adamw"),
        ("train.dtype=float32", "float32"),
    ],
)
def test_a_checkpoint_of_another_model(trained, config, override, word):
    before = [(path, path.stat().st_mtime_ns) for path in sorted(trained.rglob("*"))]
    job = ["run", config, f"name={trained.name}", "train.steps=4", override]
    told(dtrain(*job, ranks=RANKS), f"{trained}/checkpoints/step_00000002", word)
    assert [(path, path.stat().st_mtime_ns) for path in sorted(trained.rglob("*"))] == before


@pytest.mark.parametrize("command", [["sample"], ["checkpoint", "ls"], ["checkpoint", "verify"]])
@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_commands_on_a_run_that_is_not_there(folder, command, ranks):
    told(dtrain(*command, folder / "runs" / "no", ranks=ranks), "runs/no", "no such")


def test_wrong_command_lines():
    told(dtrain("rum"), "rum", "run")
    told(dtrain("run"), "CONFIG")
    told(dtrain("run", "--fast"), "--fast")
    told(dtrain("sample", "x", "--tokens", "many"), "--tokens", "many")
    told(dtrain("bench", "step", "configs/bench_gpt.yaml", "--ranks", "2,x"), "--ranks", "2,x")
    told(dtrain("show", "graph", "configs/gpt_ddp.yaml", "--output", "/nowhere/g.svg"), "/nowhere/g.svg")


@needs_mpirun
def test_wrong_command_lines_under_mpirun(folder, config):
    told(dtrain("rum", ranks=2), "rum", "run")
    told(dtrain("show", "graph", config, "--output", "/nowhere/g.svg", ranks=2), "/nowhere/g.svg")
    told(dtrain("bench", "step", config, ranks=2), "without mpirun")


def private_mounts() -> list[str] | None:
    """A command prefix that may mount without others seeing it; None where that is not allowed."""
    for prefix in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        trial = [*prefix, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        if shutil.which("unshare") and subprocess.run(trial, capture_output=True).returncode == 0:
            return prefix
    return None


def on_a_small_disk(folder: Path, size: str, script: str) -> program.Ended:
    """Run a shell script with a disk of that size at `folder`, which vanishes with it."""
    prefix = private_mounts()
    if prefix is None:
        pytest.skip("this machine does not let us mount a small disk")
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} none "{folder}" && cd "{folder}" && {script}'
    return Process([*prefix, "sh", "-c", mount]).finish()


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=needs_mpirun)])
def test_a_disk_that_fills_up_with_checkpoints(tmp_path, config, ranks):
    """The job ends; the checkpoint that was complete is complete still, and with room the run goes on to its end."""
    disk = tmp_path / "disk"
    run = " ".join(program.on(ranks, "dtrain", "run", f"'{config}'", f"output='{disk}'", "name=r", "checkpoint.keep=0"))
    script = f"head -c 18500k /dev/zero > fill; {run} checkpoint.every=4; echo exit code $?; "
    script += "dtrain checkpoint ls r; find r; "
    script += f"rm fill; {run} && echo && cat r/metrics.jsonl"
    ended = on_a_small_disk(disk, "20000k", script)
    rest = ended.out.partition("exit code ")[2]
    assert rest.startswith("2\n"), ended.out + ended.err
    message = [line for line in ended.err.splitlines() if line.startswith("dtrain: error: ")]
    assert len(message) == 1 and "Traceback" not in ended.err
    assert "No space left" in message[0] and f"{disk}/r" in message[0]
    listed = rest.splitlines()
    assert "complete" in listed[2] and "damaged" not in rest
    assert "resumed from" in rest
    steps = [line for line in listed if line.startswith('{"step"')]
    assert len(steps) == 20 and ended.code == 0


def test_a_disk_without_room_for_metrics(tmp_path, config):
    disk = tmp_path / "disk"
    script = f"head -c 120k /dev/zero > fill; dtrain run '{config}' output='{disk}' checkpoint.every=0 train.steps=2000"
    told_last(on_a_small_disk(disk, "128k", script), "No space left", f"{disk}/small")


def test_a_cache_without_room(tmp_path, config):
    disk = tmp_path / "disk"
    script = f"DTRAIN_CACHE='{disk}' dtrain run '{config}' output='{tmp_path}' train.steps=1"
    told_last(on_a_small_disk(disk, "48k", script), "No space left", str(disk))


def told_last(ended: program.Ended, *words: str) -> None:
    """As `told`, for jobs that had something to say before."""
    told(program.Ended(ended.code, "", ended.err, ended.seconds), *words)
