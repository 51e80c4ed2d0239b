"""Settings: files, overrides, and mistakes answered with the right spelling."""

import ast
import inspect
from dataclasses import fields, is_dataclass

import pytest
import yaml
from places import ROOT

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import groups_of, may_change
from llasa_jax.train.parsing import parse_settings
from llasa_jax.train.settings import Settings


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "out: o\nmodel: {path: m}\ndata: {path: d, max_length: 1024}\ntrain: {rows: 4}\n"
    )
    return path


def test_file_then_overrides(config):
    samples = ["--log.samples=[Hello., 'Yes, please.']", "--log.codec=folder"]
    settings = parse_settings(
        [
            "--config",
            str(config),
            "--train.rows=8",
            "--prompt.system",
            "Speak: {description}",
            *samples,
        ]
    )
    assert settings.log.samples == ["Hello.", "Yes, please."]
    assert isinstance(settings, Settings)
    assert (settings.data.max_length, settings.train.rows, settings.prompt.system) == (
        1024,
        8,
        "Speak: {description}",
    )
    assert settings.optimizer.beta2 == 0.95


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["--train.row=8"],
            "unknown setting train.row in the command line; did you mean train.rows?",
        ),
        (["--lerning_rate=1"], "did you mean optimizer.learning_rate?"),
        (["--train.rows=many"], "train.rows.*many"),
        (["--model.dtype=f16"], "model.dtype.*f16"),
        (["--train.rows=0"], "train.rows is 0; it must be at least 1"),
        (["--train.save_every=0"], "train.save_every is 0; it must be at least 1"),
        (["--log.samples=[Hello]"], "log.samples needs log.codec"),
        (["--optimizer.schedule=linear"], "optimizer.schedule.*linear"),
        (["--optimizer.name=adamz"], "optimizer.name.*adafactor.*adagrad.*lion.*sgd.*adamz"),
        (
            ["--optimizer.name=adafactor", "--optimizer.offload=true"],
            "optimizer.offload has nothing to move for adafactor",
        ),
        (["--train.epochs=0"], "train.steps or train.epochs above 0"),
        (["--model.loss_chunk=100"], "loss_chunk=100 does not divide data.max_length=1024"),
        (["--model.path="], "model.path is not set"),
        (["--prompt.user={txet}"], "prompt.user mentions {txet}"),
    ],
)
def test_mistakes(config, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_settings([f"--config={config}", *arguments])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("train: {row: 3}", r"unknown setting train.row in .*bad.yaml; did you mean train.rows\?"),
        ("[1, 2]", "write settings as `key: value`"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, content, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        parse_settings(["--config", str(path)])
    with pytest.raises(UserError, match="nowhere.yaml: the config is missing"):
        parse_settings(["--config", "nowhere.yaml"])


def every_group(cls=Settings):
    yield cls
    for field in fields(cls):
        for inner in groups_of(field.type):
            yield from every_group(inner)


def explanations(cls) -> dict[str, str]:
    """The text under each field of a dataclass."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def test_every_setting_is_explained_and_help_shows_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for cls in set(every_group()):
        explained = explanations(cls)
        for field in fields(cls):
            if not is_dataclass(field.type):
                assert field.name in explained, f"explain {cls.__name__}.{field.name} below it"
                # Help shows a list, not the settings of its members.
                if cls.__name__ not in ("SourceSettings", "RewardSettings", "GuardSettings"):
                    assert explained[field.name] in shown, f"{cls.__name__}.{field.name}"
    assert "It must be at least 0 and at most 1,000,000. (type: float, default: 1.0)" in shown
    assert "It may change when a run resumes. (type: int, default: 500)" in shown


def test_what_may_change_when_a_run_resumes():
    mesh = "data fsdp tensor slices hosts start_timeout coordinator process_count process_index"
    train = "save_every save_minutes keep keep_best keep_best_by validate_every"
    online = "device queue workers read_ahead cache max_bad_share stall_seconds torch_threads"
    assert may_change(Settings) == {
        # Fingerprints tell models, data and codecs apart, not where they lie.
        "out",
        "model.path",
        "lora.init",
        "data.path",
        "data.sources.path",
        "data.online.codec",
        "data.doctor",
        "data.streams",
        "data.cache_dir",
        "optimizer.offload",
        "profile.steps",
        *(f"mesh.{name}" for name in (*mesh.split(), "compiled")),
        *(f"model.{name}" for name in ("attention", "remat", "loss_chunk")),
        *(f"train.{name}" for name in train.split()),
        *(f"align.grpo.{name}" for name in ("rows", "device", "processes", "patience", "guards")),
        *(f"align.grpo.{name}" for name in ("audio_every", "least_stopped", "most_pace")),
        *(f"evaluate.{name}" for name in ("every", "texts", "scorers", "device")),
        *(f"evaluate.{name}" for name in ("speaker", "reference", "language")),
        *(f"data.online.{name}" for name in (*online.split(), "gpu_memory")),
        *(f"log.{name}" for name in ("every", "tensorboard", "wandb", "codec", "codec_device")),
        *(f"log.{name}" for name in ("samples", "samples_every", "samples_speaker")),
    }


RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs" / "machines").glob("*.yaml"))


def test_every_recipe_parses_with_every_overlay():
    assert RECIPES
    assert OVERLAYS
    for recipe in RECIPES:
        alone = parse_settings(["--config", str(recipe)])
        assert yaml.safe_load(recipe.read_text())["model"]["path"] == alone.model.path
        for overlay in OVERLAYS:
            both = parse_settings([f"--config={recipe}", f"--config={overlay}"])
            machine = yaml.safe_load(overlay.read_text())
            assert both.model.remat == machine["model"]["remat"]
            assert both.mesh.fsdp == machine["mesh"]["fsdp"]
            # An overlay decides where and how, never what is learned from which batch.
            assert (both.train, both.data, both.lora) == (alone.train, alone.data, alone.lora)
            assert both.optimizer.learning_rate == alone.optimizer.learning_rate


def test_recipes_and_overlays_are_not_copies():
    for folder in (RECIPES, OVERLAYS):
        contents = [
            {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "out"}
            for path in folder
        ]
        names = [path.stem.split("_")[0] for path in folder]
        for at, content in enumerate(contents):
            same = [names[i] for i in range(at) if contents[i] == content]
            assert names[at] not in same, f"{folder[at]} repeats another recipe"
