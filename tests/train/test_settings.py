"""Settings: files, overrides, and mistakes answered with the right spelling."""

import pytest
import yaml
from places import ROOT

from llasa_jax.errors import UserError
from llasa_jax.train.settings import Settings, parse_settings


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
        (["--train.rows=0"], "train.rows must be at least 1 but is 0"),
        (["--train.save_every=0"], "train.save_every must be at least 1 but is 0"),
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
        ("[1, 2]", "must hold settings as `key: value`"),
        ("a: b: c", "is no YAML"),
    ],
)
def test_bad_files(tmp_path, content, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        parse_settings(["--config", str(path)])
    with pytest.raises(UserError, match="nowhere.yaml does not exist"):
        parse_settings(["--config", "nowhere.yaml"])


def test_every_recipe_parses():

    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        settings = parse_settings(["--config", str(recipe)])
        assert yaml.safe_load(recipe.read_text())["model"]["path"] == settings.model.path
