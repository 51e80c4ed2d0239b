"""Every setting with values that people and damaged files bring: a sentence, or a value within the
setting's range. Never a traceback, and nothing outside its range is taken.
"""

import math
import random
from dataclasses import fields, is_dataclass

import pytest
import yaml

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import check
from llasa_jax.train.parsing import all_fields, parse_settings
from llasa_jax.train.settings import Settings

NEEDED = {"out": "o", "model": {"path": "m"}, "data": {"path": "d"}}
BAD = [
    *("", "null", "none", "~", "true", "nan", ".nan", "inf", ".inf", "-.inf", "-1", "0", "1", "2"),
    *("1e12", "-1e12", "1e300", "1e-300", "1e30", "18446744073709551616", "-9223372036854775808"),
    *("3.7", "²", "0x10", "1_000", "1:2", "[1]", "[]", "{}", "{a: 1}", "[[]]", "[null]", "a, b"),
    *("{text!r}", "{text:>500}", "{text", "{}", "{0}", "{text.x}", "{codes}{codes}", "{text[0]}"),
    *("<|eot_id|>", "<|s_5|>", "x" * 300, "/" + "y" * 5000, "a\x00b", "\ud800", "日本", "*ref"),
    *("!!python/object:os.system", "'", '"', "- -", ": :", "%", "@", "`", "\t", "&a", "meta:9999"),
]
FIELDS = all_fields(Settings)
LEAVES = {name: field for name, field in FIELDS.items() if not is_dataclass(field.type)}


def parsed(arguments):
    """The settings, or None where they are refused in a sentence."""
    try:
        return parse_settings(arguments)
    except UserError:
        return None


def value_of(settings, name):
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(yaml.safe_dump(NEEDED))
    return path


def assert_allowed(field, value):
    """What was accepted is of the field's type and in its range."""
    if field.type in (int, float):
        assert isinstance(value, int | float)
        assert not isinstance(value, bool)
        assert math.isfinite(value)
    if field.type in (bool, str):
        assert isinstance(value, field.type)
    allowed = field.metadata.get("allowed")
    assert allowed is None or allowed.takes(value)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_values_on_the_command_line(seed):
    draw = random.Random(seed)
    needed = ["--out=o", "--model.path=m", "--data.path=d"]
    for name, field in LEAVES.items():
        if name.startswith("data.sources."):
            continue
        for value in draw.sample(BAD, 2):
            settings = parsed([*needed, f"--{name}={value}"])
            if settings:
                assert_allowed(field, value_of(settings, name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_values_in_a_file(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "c.yaml"
    objects = [None, True, 5, -1, 2.5, float("nan"), float("inf"), 10**30, "", "null", [], {}, [1]]
    objects += [[None], {"a": 1}, {"steps": {}}, [[]], "x" * 5000, "\0", "\ud800", {1: 2}]
    groups = [name for name in FIELDS if name not in LEAVES and "sources" not in name]
    for name in groups:
        tree = yaml.safe_load(yaml.safe_dump(NEEDED))
        *above, last = name.split(".")
        group = tree
        for part in above:
            group = group.setdefault(part, {})
        group[last] = draw.choice([None, 5, [], [{}], "x"])
        path.write_text(yaml.safe_dump(tree))
        assert parsed([f"--config={path}"]) is None
    for name, field in LEAVES.items():
        parts = name.split(".")
        for value in draw.sample(objects, 2):
            tree = yaml.safe_load(yaml.safe_dump(NEEDED))
            if name.startswith("data.sources."):
                del tree["data"]["path"]
                source = group = {"path": "s"}
                tree["data"]["sources"] = [source]
                parts = parts[2:] if parts[0] == "data" else parts
            else:
                group = tree
            for part in parts[:-1]:
                group = group.setdefault(part, {})
            group[parts[-1]] = value
            path.write_bytes(yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))
            settings = parsed([f"--config={path}"])
            if settings and not name.startswith("data.sources."):
                assert_allowed(field, value_of(settings, name))
                if field.type is str:
                    assert value_of(settings, name) == value or name.startswith("prompt.")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files(tmp_path, seed):
    draw = random.Random(seed)
    path = tmp_path / "c.yaml"
    text = yaml.safe_dump(NEEDED | {"train": {"rows": 4}, "log": {"samples": ["a", "b"]}})
    for _ in range(25):
        content = bytearray(text.encode(draw.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"])))
        for _ in range(draw.randrange(4)):
            at = draw.randrange(len(content))
            content[at : at + draw.randrange(1, 3)] = bytes(draw.choices(range(256), k=2))
        path.write_bytes(content[: draw.choice([None, draw.randrange(len(content))])])
        parsed([f"--config={path}"])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[" * 3000, "c.yaml: the config is"),
        ("a: &a [x]\n" + "b: [*a, *a]\n", "unknown setting a"),
        ("train: {rows: 4}\ntrain: {steps: 2}\n", "line 2?1?: train is given twice in one place"),
        ("train: {rows: 4, rows: 5}\n", "line 1: rows is given twice"),
        ("log: {samples_speaker: 007}\n", "log.samples_speaker in .* is 7, which is not a text"),
        ("prompt: {date: null}\n", "prompt.date in .* is null; give it a value"),
        ("data: {path: {a: 1}}\n", "unknown setting data.path.a"),
    ],
)
def test_files_that_mean_something_else(tmp_path, content, complaint):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        parse_settings([f"--config={path}"])


def test_utf16_is_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("out: x\ntrain: {steps: 3}\n".encode("utf-16"))
    with pytest.raises(UserError, match="the config is not UTF-8 text .*; save it as UTF-8"):
        parse_settings([f"--config={path}"])


# From the list of values that were taken although no training can want them.
NONSENSE = """
optimizer.clip=-1 optimizer.clip=1e30 optimizer.clip=.inf optimizer.learning_rate=-1
optimizer.learning_rate=0 optimizer.beta2=2 optimizer.beta2=0 optimizer.beta1=1 optimizer.eps=-1
optimizer.eps=1e30 optimizer.eps=.inf optimizer.eps=0 optimizer.weight_decay=-1
optimizer.weight_decay=-10 optimizer.warmup_ratio=-1 optimizer.warmup_ratio=1
optimizer.warmup_ratio=2 optimizer.warmup_ratio=.nan lora.alpha=0 lora.alpha=-1 lora.rank=-1
lora.dropout=1 lora.targets=[q,q] lora.train_also=[norms,norms] train.epochs=-1 train.epochs=.nan
train.epochs=.inf train.epochs=1e30 train.seed=-1 train.seed=1e12 train.seed=18446744073709551616
train.rows=1e12 train.rows=1000000000000 train.steps=1000000000000 train.accumulation=1000000000000
data.max_length=1000000000000 data.online.split_seed=-1 data.online.queue=1000000000000
data.online.workers=1000000000000 data.online.torch_threads=5000 data.online.device=meta
data.online.device=nope data.online.gpu_memory=0.99 data.validation_split=train data.train_split=
profile.steps=1:99999999999 profile.steps=²:3 profile.steps=8:20 model.loss_chunk=0
model.loss_chunk=-1 model.loss_chunk=-256 mesh.slices=0 mesh.slices=3 mesh.fsdp=0 mesh.tensor=-2
prompt.user={text!r} prompt.user={text:>500} prompt.user={text:.3} prompt.user={text:{speaker}}
prompt.user={text:d} prompt.user={speaker:>2000000000}{text} prompt.assistant={codes}{codes}
prompt.system=<|eot_id|> prompt.date=<|eot_id|> prompt.date=soon out=null model.path=null
log.codec=null
"""


@pytest.mark.parametrize("assignment", NONSENSE.split())
def test_nonsense_is_refused(config, assignment):
    name = assignment.partition("=")[0]
    given = [f"--config={config}", "--train.steps=9", f"--{assignment}"]
    if name == "train.steps":
        del given[1]
    with pytest.raises(UserError, match=name.replace(".", r"\.").rpartition(".")[2]):
        parse_settings(given)


def test_a_setting_given_twice_and_a_group_as_a_flag(config):
    for given, complaint in (
        (["--train.rows=4", "--train.rows=8"], "train.rows is given twice, as 4 and 8"),
        (['--train={"steps": 2}'], "train is a group of settings"),
        (["--data.sources+=x"], "data.sources"),
    ):
        with pytest.raises(UserError, match=complaint):
            parse_settings([f"--config={config}", *given])
    assert (
        parse_settings([f"--config={config}", "--train.rows=4", "--train.rows=4"]).train.rows == 4
    )


def test_the_same_dataset_twice_and_validation_on_what_is_trained(tmp_path):
    path = tmp_path / "c.yaml"
    chat = {"path": "a", "prompt": {"task": "asr"}}
    for sources, complaint in (
        ([{"path": "a"}, {"path": "./a"}], r"data.sources\[1\] is ./a a second time"),
        ([{"path": "a", "validation_split": "train"}], "is train, which is trained on too"),
        (
            [{"path": "a"}, {"path": "b", "validation_split": "x"}, {"path": "b", "split": "x"}],
            r"data.sources\[1\].validation_split is x of b, which another source trains on",
        ),
        ([{"path": "a", "weight": 1e300}], r"data.sources\[0\].weight is 1e\+300"),
        ([{"path": "a", "weight": 1e-300}], r"data.sources\[0\].weight is 1e-300"),
        ([{"path": "a"}, chat], None),
    ):
        path.write_text(
            yaml.safe_dump({"out": "o", "model": {"path": "m"}, "data": {"sources": sources}})
        )
        if complaint:
            with pytest.raises(UserError, match=complaint):
                parse_settings([f"--config={path}"])
        else:
            assert len(parse_settings([f"--config={path}"]).sources) == 2


def test_defaults_are_allowed():
    def walk(cls):
        for field in fields(cls):
            if is_dataclass(field.type):
                walk(field.type)
                check_default = field.type()
                for inner in fields(check_default):
                    allowed = inner.metadata.get("allowed")
                    value = getattr(check_default, inner.name)
                    assert allowed is None or allowed.takes(value), f"{field.name}.{inner.name}"

    walk(Settings)
    check(parse_settings(["--out=o", "--model.path=m", "--data.path=d"]))
