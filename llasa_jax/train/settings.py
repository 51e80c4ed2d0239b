"""All settings of a training run, as a YAML file spells them. A recipe in `configs/` is the
experiment; unknown keys are errors.
"""

import difflib
import re
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.evaluate.settings import EvaluateSettings
from llasa_jax.model.settings import Dtype, LoraSettings, MeshSettings, ModelSettings
from llasa_jax.runtime.files import read_yaml
from llasa_jax.runtime.settings import (
    CODEC_DEVICE,
    DEVICE_WORDS,
    MAX_SEED,
    check,
    group,
    groups_of,
    notes,
    setting,
)
from llasa_jax.speech.settings import PromptSettings

# Tokens of one step: arrays of them are indexed with 32 bits.
MAX_TOKENS = 2**31 - 1
STREAM_ROWS = 16  # fewest rows of a stream, where data.streams is 0


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "adafactor", "adagrad", "lion", "sgd"] = "adamw"
    """AdamW keeps two more copies of the weights in memory; lion, sgd (with momentum) and adagrad
    one; adafactor next to nothing (factored second moments, no first). Lion wants a third of
    AdamW's learning rate or less, SGD and Adagrad far more."""
    learning_rate: float = setting(1e-5, above=0, high=100)
    """Peak of the schedule."""
    schedule: Literal["cosine", "constant", "deepspeed"] = "cosine"
    """After the warm-up: cosine decays to zero, as HF's Trainer does; constant stays; deepspeed is
    DeepSpeed's WarmupCosineLR as upstream sets it (logarithmic warm-up from 3% of the peak, cosine
    down to 10% of it)."""
    warmup_ratio: float = setting(0.03, low=0, below=1)
    """Share of the steps in which the learning rate rises to its peak."""
    beta1: float = setting(0.9, low=0, below=1)
    """Decay of the mean gradient: AdamW's and Lion's first moment, SGD's momentum."""
    beta2: float = setting(0.95, above=0, below=1)
    """Decay of the mean squared gradient of AdamW; of the momentum of Lion."""
    eps: float = setting(1e-8, low=1e-20, high=1)
    """Added to the denominator of AdamW's and Adagrad's update."""
    weight_decay: float = setting(0.01, low=0, high=100)
    """Decoupled weight decay: each step takes learning_rate x weight_decay x weight off."""
    decay_norms: bool = False
    """Decay the norms' weights too, as DeepSpeed does; HF's Trainer leaves them out."""
    clip: float = setting(1.0, low=0, high=1_000_000)
    """Largest global norm of the gradient; a larger one is scaled down. 0 turns clipping off."""
    state_dtype: Dtype = "float32"
    """Type in which the optimizer's state is kept; bfloat16 halves its memory, and changes below
    1/256 of a value are lost to rounding. The arithmetic is in float32 all the same."""
    offload: bool = setting(False, resume=True)
    """Keep the optimizer's state in pinned host memory and stream it through the device in the
    update."""

    def check(self, name: str) -> None:
        if self.offload and self.name == "adafactor":
            raise UserError(
                f"{name}.offload has nothing to move for adafactor, whose state is small; leave"
                " it out"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise UserError(
                f"{name}.learning_rate={self.learning_rate} times"
                f" {name}.weight_decay={self.weight_decay} takes each weight to zero or past it in"
                " a step; lower one of them"
            )


@dataclass(frozen=True)
class TrainSettings:
    """How long to train, on how large a batch, and what is kept. The newest checkpoints are kept,
    and besides them the best.
    """

    epochs: float = setting(2.0, low=0, high=1_000_000)
    """Passes over the data, where train.steps is 0."""
    steps: int = setting(0, low=0, high=1_000_000_000)
    """Steps of the optimizer; 0 means as many as train.epochs take."""
    rows: int = setting(16, low=1, high=1_048_576)
    """Batch size: rows of the batch over all devices, each of data.max_length tokens. Must be a
    multiple of mesh.data x mesh.fsdp."""
    accumulation: int = setting(1, low=1, high=65_536)
    """Batches whose gradients are summed before one step: the global batch is train.rows x
    train.accumulation rows."""
    seed: int = setting(0, low=0, high=MAX_SEED)
    """Seed of the order of the data, of new adapters and of dropout."""
    save_every: int = setting(500, low=1, high=1_000_000_000, resume=True)
    """Steps between checkpoints; the last step is always saved."""
    save_minutes: float = setting(0.0, low=0, high=1_000_000, resume=True)
    """Minutes after which there is a checkpoint in any case, beside train.save_every; 0, never."""
    keep: int = setting(2, low=1, high=1_000_000, resume=True)
    """Newest checkpoints that are kept."""
    keep_best: int = setting(0, low=0, high=1_000_000, resume=True)
    """Checkpoints that are kept besides, with the best train.keep_best_by."""
    keep_best_by: str = setting("validation_loss", resume=True)
    """What the best checkpoints have the best of: validation_loss, or a number of the evaluation as
    the metrics name it, such as evaluate_wer or evaluate_similarity."""
    validate_every: int = setting(500, low=1, high=1_000_000_000, resume=True)
    """Steps between validations, where a validation split is named."""

    def check(self, name: str) -> None:
        if not self.steps and not self.epochs:
            raise UserError(f"set {name}.steps or {name}.epochs above 0 (both are 0)")


@dataclass(frozen=True)
class LogSettings:
    """What a run says of itself. metrics.jsonl always has every step."""

    every: int = setting(10, low=1, high=1_000_000_000, resume=True)
    """Steps between lines on the terminal."""
    tensorboard: bool = setting(True, resume=True)
    """Write the metrics for TensorBoard as well."""
    wandb: str = setting("", resume=True)
    """Project of Weights & Biases to log to as well; empty, none."""
    samples: list[str] = setting(list, resume=True)
    """Texts that the model speaks from time to time while it is trained."""
    samples_every: int = setting(500, low=1, high=1_000_000_000, resume=True)
    """Steps between two rounds of samples."""
    samples_speaker: str = setting("", resume=True)
    """Speaker of the samples, one of the training data; empty, none is named."""
    codec: str = setting("", path=True, resume=True)
    """Codec that turns the samples' codes into sound: a hub id or a folder."""
    codec_device: str = setting("cpu", pattern=CODEC_DEVICE, words=DEVICE_WORDS, resume=True)
    """Device of the samples' codec, as data.online.device."""

    def check(self, name: str) -> None:
        if self.samples and not self.codec:
            raise UserError(
                f"{name}.samples needs {name}.codec, which turns codes into sound; give a codec's"
                " folder or hub id, or no samples"
            )


@dataclass(frozen=True)
class ProfileSettings:
    """A trace of some steps, for XProf and TensorBoard."""

    steps: str = setting("", resume=True)
    """first:last, such as 10:13, traces steps 10 to 12 into the run's profile/; empty, none."""

    def check(self, name: str) -> None:
        traced_steps(self.steps)


def traced_steps(steps: str, total: int = 0) -> range:
    """The steps of `profile.steps`, "first:last" or "". UserError if it names none, or one past the
    `total`, where that is known.
    """
    if not steps:
        return range(0)
    named = re.fullmatch(r"(\d{1,10}):(\d{1,10})", steps, re.ASCII)
    traced = range(int(named[1]), int(named[2])) if named else range(0)
    if not traced or not traced.start:
        raise UserError(
            f"profile.steps={steps} names no steps; 10:13 would trace steps 10, 11 and 12"
        )
    if total and traced[-1] > total:
        raise UserError(
            f"profile.steps={steps} goes past the last step, {total}; name steps up to"
            f" {traced.start}:{total + 1}"
            if traced.start <= total
            else f"profile.steps={steps} begins after the last step, {total}; name steps up to it"
        )
    return traced


@dataclass(frozen=True)
class Settings:
    """A training run. The same command goes on from the last checkpoint."""

    out: str = setting("", path=True, resume=True)
    """The run's folder: settings, metrics, checkpoints."""
    model: ModelSettings = group(ModelSettings)
    lora: LoraSettings = group(LoraSettings)
    data: DataSettings = group(DataSettings)
    prompt: PromptSettings = group(PromptSettings)
    mesh: MeshSettings = group(MeshSettings)
    optimizer: OptimizerSettings = group(OptimizerSettings)
    train: TrainSettings = group(TrainSettings)
    log: LogSettings = group(LogSettings)
    evaluate: EvaluateSettings = group(EvaluateSettings)
    profile: ProfileSettings = group(ProfileSettings)

    def __post_init__(self):
        check(self)
        # Prompts are written out, so that a run's settings.yaml shows its wording and a later
        # default cannot change it.
        sources = [
            replace(source, prompt=source.prompt and source.prompt.filled())
            for source in self.data.sources
        ]
        object.__setattr__(self, "data", replace(self.data, sources=sources))
        object.__setattr__(self, "prompt", self.prompt.filled())

    def check(self, name: str) -> None:
        """UserError on settings of different groups that cannot work together."""
        if not self.out:
            raise UserError("out is not set; give it in the config or as --out=FOLDER")
        if self.evaluate.every and not self.log.codec:
            raise UserError(
                "evaluate.every needs log.codec, which turns codes into sound; give a codec's"
                " folder or hub id, or leave evaluate.every at 0"
            )
        if self.data.max_length % self.model.loss_chunk:
            raise UserError(
                f"model.loss_chunk={self.model.loss_chunk} does not divide"
                f" data.max_length={self.data.max_length}; choose a divisor"
            )
        if self.train.rows % (self.data.streams or 1):
            raise UserError(
                f"data.streams={self.data.streams} does not divide train.rows={self.train.rows};"
                " choose a divisor"
            )
        tokens = self.train.rows * self.train.accumulation * self.data.max_length
        if tokens > MAX_TOKENS:
            raise UserError(
                f"train.rows x train.accumulation x data.max_length is {tokens:,} tokens per step;"
                f" it must be at most {MAX_TOKENS:,}"
            )
        traced_steps(self.profile.steps, self.train.steps)

    @property
    def sources(self) -> list[SourceSettings]:
        """The datasets to train on, each with its prompt: `data.sources`, or the one at
        `data.path`.
        """
        data = self.data
        listed = data.sources or [
            SourceSettings(data.path, data.train_split, data.validation_split)
        ]
        listed = [
            replace(source, prompt=source.prompt or self.prompt, mode=source.mode or data.mode)
            for source in listed
        ]
        return [replace(source, mode="offline") if source.is_chat else source for source in listed]

    @property
    def streams(self) -> int:
        """How many streams the data is cut into: the largest power of two that divides the rows and
        leaves each stream `STREAM_ROWS`, if no other number is set.
        """
        if self.data.streams:
            return self.data.streams
        streams = 1
        while self.train.rows % (2 * streams) == 0 and self.train.rows >= 2 * streams * STREAM_ROWS:
            streams *= 2
        return streams

    @property
    def packing(self) -> dict:
        """How rows are filled, as options of `batching.plan` and `batching.measure`."""
        return {
            "pack": self.data.pack,
            "too_long": self.data.too_long,
            "seed": self.train.seed,
            "streams": self.streams,
        }

    @property
    def step_options(self) -> dict:
        """What a `TrainStep` needs to know besides the model: how weights and state are kept."""
        return {
            "frozen_dtype": self.lora.frozen_dtype,
            "quantization": self.lora.quantize,
            "offload": self.optimizer.offload,
        }

    @property
    def voice(self) -> PromptSettings:
        """How the trained model is asked to speak: the prompt of the first source that teaches it
        to, or of the first of all.
        """
        prompts = [source.prompt for source in self.sources if source.prompt]
        return next((prompt for prompt in prompts if prompt.task == "tts"), prompts[0])


def parse_settings(arguments: list[str]) -> Settings:
    """Settings from `--config FILE`, which may be given several times, and `--any.setting=value`;
    later ones win. UserError on an unknown key or a bad value.
    """
    from jsonargparse import ArgumentError

    _check_arguments(arguments)
    parser = settings_parser()
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    parsed.pop("config")
    return Settings(**vars(parser.instantiate(parsed)))


@cache
def settings_parser():
    """The parser of `llasa-jax train`, whose help explains every setting."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="llasa-jax train",
        exit_on_error=False,
        allow_abbrev=False,
        description="Finetunes a model on records. With --resume-loop=N before the settings it is"
        " started again up to N times where it fails.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file with any of the settings below; of several, the later wins",
    )
    parser.add_class_arguments(Settings)
    explained = _fields(Settings)
    for action in parser._actions:
        if action.dest in explained:
            action.help = f"{action.help} {notes(explained[action.dest])}".strip()
    return parser


def _check_arguments(arguments: list[str]) -> None:
    """Refuses what the parser would not: unknown keys with the nearest known one, files that are
    not settings, and a setting given twice.
    """
    known = {name: field.type for name, field in _fields(Settings).items()}
    given: dict[str, str] = {}
    for at, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument.removeprefix("--").partition("=")
        value = value if equals else "".join(arguments[at + 1 : at + 2])
        if name == "config":
            _check_file(Path(value), known)
        elif name not in ("help", "print_config"):
            _check_key(name.removesuffix("+"), "the command line", known)
            if is_dataclass(known[name.removesuffix("+")]):
                raise UserError(
                    f"{name} is a group of settings; give each as --{name}.NAME=VALUE, or many in"
                    " a --config FILE"
                )
            if given.setdefault(name, value) != value and not name.endswith("+"):
                raise UserError(
                    f"{name} is given twice, as {given[name]} and {value}; give it once"
                )


def _check_file(path: Path, known: dict[str, Any]) -> None:
    tree = read_yaml(
        path, "the config", fix="write settings as `key: value`, as the recipes in configs/ do"
    )

    def walk(group: dict, prefix: str):
        for key, value in group.items():
            _check_entry(f"{prefix}{key}", value, path, known)
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, dict):
                    walk(inner, f"{prefix}{key}.")

    walk(tree, "")
    _check_repeated(path, yaml.compose(path.read_text("utf-8-sig"), yaml.SafeLoader))


def _check_repeated(path: Path, node: yaml.Node | None) -> None:
    """Refuses the same key twice in one mapping, of which YAML would drop the first."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            if keys.count(key.value) > 1:
                raise UserError(
                    f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice in one"
                    " place; join them"
                )
            _check_repeated(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_repeated(path, value)


def _check_entry(key: str, value: Any, path: Path, known: dict[str, Any]) -> None:
    """Refuses an unknown key, and what YAML takes for another type where a text is wanted."""
    _check_key(key, str(path), known)
    wanted = known[key]
    if value is None and wanted not in (str, list[str]) and type(None) not in get_args(wanted):
        raise UserError(f"{key} in {path} is null; give it a value, or leave it out")
    if is_dataclass(wanted) and not isinstance(value, dict):
        raise UserError(
            f"{key} in {path} is {value!r}, but a group of"
            " settings; give it some of them, or leave it out"
        )
    values = value if wanted == list[str] and isinstance(value, list) else [value]
    for text in values if wanted in (str, list[str]) else []:
        if text is None:
            raise UserError(f"{key} in {path} is null; give it a value, or leave it out")
        if not isinstance(text, str | list | dict):
            raise UserError(f"{key} in {path} is {text}, which is not a text; put it in quotes")


def _fields(cls: type, prefix: str = "") -> dict[str, Field]:
    """Every setting and group by its full name."""
    named = {}
    for field in fields(cls):
        named[prefix + field.name] = field
        for inner in groups_of(field.type):
            named |= _fields(inner, f"{prefix}{field.name}.")
    return named


def _check_key(key: str, where: str, known: dict[str, Any]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1, 0.0)
        raise UserError(f"unknown setting {key} in {where}; did you mean {close[0]}?")
