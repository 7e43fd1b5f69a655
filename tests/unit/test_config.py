"""The structs, and the way from YAML to them: right values come through, wrong ones are told with place and remedy."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import config as schema
from dtrain.config import Config, check
from dtrain.errors import UserError
from dtrain.launch import configuration, yamltree

ROOT = Path(__file__).parents[2]
GPT = """\
name: test
model: {kind: gpt, layers: 2, dim: 32, heads: 4, sequence: 16}
data: {kind: text, path: stdlib}
optimizer: {kind: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.95]}
schedule:
  kind: cosine
  warmup_steps: 10
train: {steps: 200, global_batch: 32, micro_batch: 4}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "test.yaml"
    path.write_text(GPT)
    return path


def load(path, *overrides) -> Config:
    return configuration.load(path, overrides)


def message(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load(path, *overrides)
    return str(caught.value)


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_is_short(path):
    loaded = load(path)
    assert len(path.read_text().splitlines()) <= 40
    command = path.read_text().split("\n")[0]
    assert command.startswith("# ") and f"configs/{path.name}" in command
    mpirun = re.match(r"# mpirun -n (\d+) dtrain run ", command)
    assert mpirun or command.startswith("# dtrain ")
    ranks = int(mpirun[1]) if mpirun else 1
    sizes = check(loaded, ranks).parallel
    workers = ranks - loaded.parameter_server.servers
    assert sizes.dp * sizes.tp * sizes.pp * sizes.cp * sizes.ep == workers  # written for as many as the command starts
    if sizes.dp == workers and not loaded.parameter_server.servers:  # data parallelism fits any number
        assert all(check(loaded, size).parallel.dp == size for size in (1, 2))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_dump_reads_back_to_the_same(path, tmp_path):
    loaded = load(path)
    (tmp_path / "again.yaml").write_text(configuration.dump(loaded))
    assert load(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_what_a_run_tells_reads_back_to_the_same(path, tmp_path):
    loaded = load(path)
    told = list(configuration.brief(loaded))
    (tmp_path / "again.yaml").write_text("\n".join(told))
    assert load(tmp_path / "again.yaml") == loaded
    assert len(told) <= 14 and len("\n".join(told)) < len(configuration.dump(loaded))
    assert any(line.startswith("train: {steps: ") and "dtype: " in line for line in told)  # whole: it must be given
    assert not any(line.startswith("seed") for line in told)


def test_values_arrive(file):
    loaded = load(file)
    assert loaded.model == schema.GPTConfig(layers=2, dim=32, heads=4, sequence=16)
    assert loaded.model.kind == "gpt"
    assert loaded.optimizer.betas == (0.9, 0.95)
    assert loaded.schedule == schema.CosineConfig(warmup_steps=10)
    assert loaded.checkpoint == schema.CheckpointConfig(every=100, keep=3, resume="auto")


def test_the_file_gives_the_name(tmp_path):
    (tmp_path / "my-run.yaml").write_text(GPT.replace("name: test\n", ""))
    assert load(tmp_path / "my-run.yaml").name == "my-run"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.steps=1e3", "train", "steps", 1000),
        ("optimizer.learning_rate=1e-3", "optimizer", "learning_rate", 0.001),
        ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
        ("optimizer.betas=[0.8, 0.9]", "optimizer", "betas", (0.8, 0.9)),
        ("optimizer.clip_norm=null", "optimizer", "clip_norm", None),
        ("model.bias=false", "model", "bias", False),
        ("model.kv_heads=2", "model", "kv_heads", 2),
        ("checkpoint.resume=never", "checkpoint", "resume", "never"),
        ("data.path=a=b", "data", "path", "a=b"),
        ("sample.prompt=", "sample", "prompt", ""),
        ("sample.prompt=no", "sample", "prompt", "no"),
        ("train.validate.every=0", "train", "validate", schema.ValidateConfig(every=0)),
        ("schedule={kind: linear}", "schedule", "final_fraction", 0.0),
    ],
)
def test_overrides(file, override, section, key, value):
    got = getattr(getattr(load(file, override), section), key)
    assert got == value
    assert type(got) is type(value)


def test_casts_of_gradients_that_are_half_already_are_refused(file):
    wanted = ("train.dtype=bfloat16", "parallel.compression={kind: float16}")
    assert "parallel.compression.kind: float16; saves nothing" in message(file, *wanted)
    assert load(file, "train.dtype=bfloat16", "parallel.compression={kind: int8}").parallel.compression.block == 256


def test_the_last_override_counts(file):
    assert load(file, "train.steps=1", "train.steps=2").train.steps == 2


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
scalars |= st.sampled_from(["1e3", "no", "true", "null", "~", "0x10", ".5", "12:30:00", "- x", "a: b", "#", "1_000"])


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=8))
def test_yaml_text_reads_back_to_the_same(value):
    assert yamltree.parse(yamltree.text(value))[0] == value


def test_lines_of_keys():
    assert yamltree.parse("a: 1\n\nb:\n  c: {d: 2}\n") == (
        {"a": 1, "b": {"c": {"d": 2}}},
        {"a": 1, "b": 3, "b.c": 4, "b.c.d": 4},
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.learning_rte=1", ["optimizer.learning_rte", "unknown key", "weight_decay", "mean learning_rate?"]),
        ("learning_rate=1", ["learning_rate", "unknown key", "did you mean optimizer.learning_rate?"]),
        ("optimiser.kind=sgd", ["optimiser", "unknown key", "did you mean optimizer?"]),
        ("optimizer.kind=sgd", ["optimizer.betas", "optimizer.kind: sgd", "a key of adam, adamw or lamb", "momentum"]),
        ("optimizer.kind=adamv", ["optimizer.kind: 'adamv'", "sgd, adam, adamw, lamb, adafactor", "did you mean adam"]),
        ("optimizer.kind=7", ["optimizer.kind: 7", "allowed: sgd"]),
        ("optimizer={kind: sgd}", ["optimizer.learning_rate: missing", "a number"]),
        ("optimizer={}", ["optimizer.kind: missing", "allowed: sgd"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate: 'fast'", "must be a number"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate: -1", "0 or more"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate", "a number"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas: [0.9]", "a list of 2 numbers"]),
        ("optimizer.betas=[0.9, 1]", ["optimizer.betas: [0.9, 1.0]", "[0, 1)"]),
        ("optimizer.epsilon=0", ["optimizer.epsilon: 0", "above 0"]),
        ("optimizer={kind: adafactor, learning_rate: 1, epsilon: [0, 1]}", ["epsilon: [0.0, 1.0]; must be above 0"]),
        ("optimizer={kind: adafactor, learning_rate: 1, clip_threshold: 0}", ["clip_threshold: 0.0; must be above 0"]),
        ("optimizer.clip_norm=0", ["optimizer.clip_norm: 0", "above 0, or null"]),
        ("train.steps=many", ["train.steps: 'many'", "a whole number"]),
        ("train.steps=1.5", ["train.steps: 1.5", "a whole number"]),
        ("train.steps=true", ["train.steps: true", "a whole number"]),
        ("train.steps=0", ["train.steps: 0", "1 or more"]),
        ("train.dtype=float31", ["train.dtype: 'float31'", "float32, float64, bfloat16 or float16", "mean float32?"]),
        ("train.recompute=yes", ["train.recompute: 'yes'", "true or false"]),
        ("train.validate.evry=1", ["train.validate.evry", "did you mean every?"]),
        ("train.validate=3", ["train.validate: 3", "must be a section, such as {every: ...}"]),
        ("model.heads=7", ["model.heads: 7", "must divide model.dim: 32", "nearest: 4 or 8"]),
        ("model.kv_heads=3", ["model.kv_heads: 3", "must divide model.heads: 4", "nearest: 2 or 4"]),
        ("model.dropout=1", ["model.dropout: 1", "[0, 1)"]),
        ("model.vocabulary=0", ["model.vocabulary: 0", "1 or more"]),
        ("model={kind: gpt, dim: 12, heads: 4, position: rotary}", ["model.position: rotary", "even head size"]),
        ("model={kind: mlp}", ["data.kind: text", "model.kind: mlp learns from images or table"]),
        ("model=gpt", ["model: 'gpt'", "must be a section, such as {kind: gpt, ...}"]),
        ("data.vocabulary=512", ["data.vocabulary: 512", "bytes have 256"]),
        ("data.path=", ["data.path", "must name a file, a folder or a glob"]),
        ("parallel.dp=0", ["parallel.dp: 0", "-1 for what the other axes leave"]),
        ("parallel.ep=2", ["parallel.ep: 2", "allowed: 1"]),
        ("parallel.compression={kind: topk}", ["compression.kind: 'topk'", "none, float16", "mean top_k?"]),
        ("parallel.compression={kind: top_k, rank: 2}", ["parallel.compression.rank", "it is a key of power_sgd"]),
        ("parallel.compression={kind: top_k, fraction: 0}", ["parallel.compression.fraction: 0", "above 0, at most 1"]),
        ("parallel.compression={kind: int8, block: 0}", ["parallel.compression.block: 0", "1 or more"]),
        ("parallel.compression={kind: power_sgd, rank: 0}", ["parallel.compression.rank: 0", "1 or more"]),
        ("parallel={data_parallel: naive, compression: {kind: int8}}", ["compression.kind: int8", "ddp", "not naive"]),
        ("parallel.data_parallel=dpp", ["parallel.data_parallel: 'dpp'", "naive, ddp", "did you mean ddp?"]),
        ("name=a/b", ["name: a/b", "the name of a folder"]),
        ("name=3", ["name: 3", "must be text"]),
        ("seed=-1", ["seed: -1", "0 or more"]),
        ("train.steps", ["'train.steps' is not key.path=value"]),
        ("=3", ["'=3' is not key.path=value"]),
        ("train..steps=3", ["is not key.path=value"]),
        ("train.steps.x=3", ["train.steps is 200, it has no keys inside"]),
        ("train.steps=[1", ["train.steps=[1", "not valid YAML"]),
    ],
)  # fmt: skip
def test_wrong_overrides(file, override, parts):
    told = message(file, override)
    assert not [part for part in parts if part not in told], told
    if "optimizer.betas: unknown" not in told and "data.kind" not in told:
        assert told.startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["test.yaml: is empty", "model, data, optimizer"]),
        ("- 1\n", ["test.yaml: holds [1]"]),
        ("a: [1\nb: 2\n", ["test.yaml, line 2", "not valid YAML"]),
        ("\ta: 1\n", ["test.yaml, line 1", "not valid YAML"]),
        ("a: &x [*x]\n", ["test.yaml, line 1: a: unknown key"]),
        ("a: !!python/object:os.system 1\n", ["test.yaml, line 1", "not valid YAML"]),
        ("? [1]\n: 2\n", ["test.yaml, line 1", "not valid YAML"]),
        ("a: 1\n---\nb: 2\n", ["test.yaml, line 2", "not valid YAML"]),
        (GPT + "train: {steps: 1}\n", ["test.yaml, line 9: train: stands twice, first in line 8"]),
        (GPT.replace("warmup_steps: 10", "warmup: 10"), ["test.yaml, line 7: schedule.warmup", "mean warmup_steps?"]),
        (GPT.replace("kind: cosine", "kind: cos"), ["test.yaml, line 6: schedule.kind: 'cos'", "inverse_sqrt"]),
        (GPT.replace("kind: text", "kind: txt"), ["test.yaml, line 3: data.kind: 'txt'", "did you mean text?"]),
        (GPT.replace("steps: 200", "steps: -5"), ["test.yaml, line 8: train.steps: -5"]),
        (GPT + "pipelines: {schedule: 1f1b}\n", ["test.yaml, line 9: pipelines: unknown key", "mean pipeline?"]),
        (GPT.replace("steps: 200, ", ""), ["test.yaml, line 8: train.steps: missing"]),
        (GPT.replace("data: {kind: text, path: stdlib}\n", ""), ["test.yaml: data: missing", "kind: text, tokens"]),
        ("".join(f"key{i}: 1\n" for i in range(20)), ["line 8: key7", "... and 16 more"]),
    ],
)  # fmt: skip
def test_wrong_files(file, text, parts):
    file.write_text(text)
    told = message(file)
    assert not [part for part in parts if part not in told], told


def test_all_problems_at_once(file):
    told = message(file, "train.steps=x", "model.heds=2", "sample.tokens=-1")
    assert [line.split(": ")[1] for line in told.splitlines()] == [
        "model.heds",
        "train.steps",
    ]  # then values of right type


def test_missing_file_names_the_neighbours(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "other.yml").write_text("")
    told = message(file.with_name("tset.yaml"))
    assert "tset.yaml: no such file; there are: " in told
    assert told.index("test.yaml", told.index("there are")) < told.index("other.yml")


def test_folder_and_binary_and_unreadable(file, monkeypatch):
    (file.parent / "config.yaml").write_text(GPT)
    assert "is a folder" in (told := message(file.parent)) and "config.yaml?" in told
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in message(file)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)  # root reads everything
    assert "test.yaml: cannot be read: Permission denied" in message(file)


# --- with the number of ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_dp_is_what_is_left(file, ranks):
    assert configuration.for_ranks(load(file), ranks).parallel.dp == ranks


@pytest.mark.parametrize(
    ("override", "ranks", "parts"),
    [
        ("parallel.dp=3", 8, ["parallel.dp: 3", "8 ranks", "Nearest that can: 8, or -1", "start 3 ranks"]),
        ("parallel.pp=3", 8, ["parallel.pp: 3", "multiply", "Nearest that can: 2 or 4", "start 9 ranks"]),
        ("train.global_batch=30", 8, ["train.global_batch: 30", "8 x 4 = 32", "nearest: 32"]),
        ("train.steps=1", 3, ["train.global_batch: 32", "3 x 4 = 12", "nearest: 24 or 36"]),
        ("train.micro_batch=3", 2, ["2 x 3 = 6", "nearest: 30 or 36", "train.micro_batch: 1, 2, 4, 8 or 16"]),
    ],
)
def test_mesh_and_batch_must_fit(file, override, ranks, parts):
    with pytest.raises(UserError) as caught:
        configuration.for_ranks(load(file, override), ranks)
    assert not [part for part in parts if part not in str(caught.value)], str(caught.value)


def test_structs_check_themselves_in_python():
    with pytest.raises(ValueError, match=r"model\.heads: 3; must divide model\.dim: 256"):
        schema.GPTConfig(heads=3)
    with pytest.raises(ValueError, match=r"schedule\.final_fraction: 2"):
        schema.CosineConfig(final_fraction=2.0)
    with pytest.raises(AttributeError):
        schema.GPTConfig().heads = 4


def test_an_optimizer_that_needs_whole_parameters_is_refused_with_zero(file):
    config = load(file, "optimizer={kind: adafactor, learning_rate: 0.1}", "parallel.data_parallel=zero2")
    with pytest.raises(ValueError, match=r"optimizer.kind: adafactor; .*parallel.data_parallel: zero2 .*Allowed: sgd"):
        check(config, 2)
    assert check(config, 1).parallel.dp == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], []),
        (["parallel.sequence=true"], ["parallel.sequence: true has no effect: parallel.tp is 1"]),
        (["parallel.sequence=true", "parallel.tp=2"], []),
        (["parallel.tensor=2d"], ["parallel.tensor: 2d has no effect: parallel.tp is 1"]),
        (["parallel.context=ulysses"], ["parallel.context: ulysses has no effect: parallel.cp is 1"]),
        (["parallel.replicate=true"], ["parallel.replicate: true has no effect: parallel.data_parallel is ddp"]),
        (
            ["parallel.reshard=false", "parallel.tp=4", "parallel.data_parallel=zero3"],
            ["parallel.reshard: false has no effect: there is one data rank"],
        ),
        (["parallel.reshard=false", "parallel.cp=4", "parallel.data_parallel=zero3"], []),
        (["pipeline.schedule=gpipe"], ["pipeline.schedule: gpipe has no effect: parallel.pp is 1"]),
        (
            ["pipeline.vertical_sync=true", "parallel.pp=2"],
            ["pipeline.vertical_sync: true has no effect: pipeline.schedule is 1f1b"],
        ),
    ],
)
def test_keys_without_effect_are_told(file, overrides, told):
    assert list(schema.idle(configuration.for_ranks(load(file, *overrides), 4))) == told
