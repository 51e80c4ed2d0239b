"""All settings of a training run, as a YAML file spells them. A recipe in `configs/` is the
experiment; unknown keys are errors.
"""

import difflib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import yaml

from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.model.settings import Dtype, LoraSettings, MeshSettings, ModelSettings
from llasa_jax.speech.prompts import PromptSettings


@dataclass(frozen=True)
class OptimizerSettings:
    """`schedule` "cosine" is HF's: linear warm-up, then cosine to zero; "constant" stays after the
    warm-up; "deepspeed" is DeepSpeed's WarmupCosineLR as upstream sets it: logarithmic warm-up from
    3% of the peak, cosine down to 10% of it.

    `name`: AdamW keeps two more copies of the weights in memory; "lion", "sgd" (with momentum
    `beta1`) and "adagrad" one; "adafactor" has factored second moments and no first: next to
    nothing. Lion wants a third of AdamW's `learning_rate` or less, SGD and Adagrad far more.
    `state_dtype` bfloat16 halves those copies, which lose what is under 1/256 of them; the
    arithmetic is in float32 all the same. `offload` keeps them in the host's memory, from where
    they stream through the device during the update. Weight decay leaves out the norms, as HF's
    Trainer does; `decay_norms` takes them in, as DeepSpeed does. `clip` bounds the gradient's
    global norm; 0 turns that off.
    """

    name: Literal["adamw", "adafactor", "adagrad", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-5
    schedule: Literal["cosine", "constant", "deepspeed"] = "cosine"
    warmup_ratio: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_norms: bool = False
    clip: float = 1.0
    state_dtype: Dtype = "float32"
    offload: bool = False


@dataclass(frozen=True)
class TrainSettings:
    """`rows` and `accumulation` make the global batch, whatever the number of devices. `steps` 0
    means: as many as `epochs` take.

    The newest `keep` checkpoints are kept, and besides them the `keep_best` with the lowest
    validation loss.
    """

    epochs: float = 2.0
    steps: int = 0
    rows: int = 16
    accumulation: int = 1
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    keep_best: int = 0
    validate_every: int = 500


@dataclass(frozen=True)
class LogSettings:
    """`every`: steps between lines on the terminal; `metrics.jsonl` has them all. `wandb`: a
    project's name, to log there as well.

    The texts in `samples` are spoken every `samples_every` steps, by `samples_speaker` if set,
    through the `codec` (a folder or a hub id).
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str = ""
    samples: list[str] = field(default_factory=list)
    samples_every: int = 500
    samples_speaker: str = ""
    codec: str = ""


@dataclass(frozen=True)
class ProfileSettings:
    """`steps` "10:13" traces steps 10 to 12 into the run's `profile/`, which XProf and TensorBoard
    open.
    """

    steps: str = ""


@dataclass(frozen=True)
class Settings:
    """A training run. `out` is its folder: settings, metrics, checkpoints; the same command goes on
    from the last checkpoint.
    """

    out: str = ""
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: DataSettings = field(default_factory=DataSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    log: LogSettings = field(default_factory=LogSettings)
    profile: ProfileSettings = field(default_factory=ProfileSettings)

    def __post_init__(self):
        paths = {"out": self.out, "model.path": self.model.path} | (
            {} if self.data.sources else {"data.path": self.data.path}
        )
        for name, value in paths.items():
            if not value:
                raise UserError(f"{name} is not set; give it in the config or as --{name}=FOLDER")
        if self.data.sources and (self.data.path or self.data.validation_split):
            raise UserError(
                "data.sources lists the datasets and their splits; leave data.path and"
                " data.validation_split out"
            )
        listed = []
        for i, source in enumerate(self.data.sources):
            if not source.path:
                raise UserError(f"data.sources[{i}].path is not set; give each source one")
            if not 0 < source.weight < float("inf"):
                raise UserError(
                    f"data.sources[{i}].weight is {source.weight}; give a number above 0, or leave"
                    f" {source.path} out"
                )
            listed.append(
                replace(
                    source,
                    prompt=source.prompt and source.prompt.filled(f"data.sources[{i}].prompt"),
                )
            )
        # Prompts are written out, so that a run's settings.yaml shows its wording and a later
        # default cannot change it.
        object.__setattr__(self, "data", replace(self.data, sources=listed))
        object.__setattr__(self, "prompt", self.prompt.filled())
        if self.data.max_length % self.model.loss_chunk:
            raise UserError(
                f"model.loss_chunk={self.model.loss_chunk} does not divide"
                f" data.max_length={self.data.max_length}; choose a divisor"
            )
        if self.optimizer.offload and self.optimizer.name == "adafactor":
            raise UserError(
                "optimizer.offload has nothing to move for adafactor, whose state is small; leave"
                " it out"
            )
        train, log = self.train, self.log
        positive = {
            f"train.{name}": getattr(train, name)
            for name in ("rows", "accumulation", "keep", "save_every", "validate_every")
        }
        for name, value in (
            positive | {"log.every": log.every, "log.samples_every": log.samples_every}
        ).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1 but is {value}")
        online = self.data.online
        for name in ("queue", "workers", "read_ahead", "stall_seconds"):
            if not getattr(online, name) > 0:
                raise UserError(
                    f"data.online.{name} must be above 0 but is {getattr(online, name)}"
                )
        for name in ("max_bad_share", "validation_share", "gpu_memory"):
            if not 0 <= getattr(online, name) < 1:
                raise UserError(
                    f"data.online.{name} is a share, at least 0 and below 1, but is"
                    f" {getattr(online, name)}"
                )
        if online.torch_threads < 0:
            raise UserError(
                f"data.online.torch_threads must be at least 0 but is {online.torch_threads}"
            )
        if train.keep_best < 0:
            raise UserError(f"train.keep_best must be at least 0 but is {train.keep_best}")
        if log.samples and not log.codec:
            raise UserError(
                "log.samples needs log.codec, which turns codes into sound; give a codec's folder"
                " or hub id, or no samples"
            )
        if train.steps < 0 or (train.steps == 0 and train.epochs <= 0):
            raise UserError(
                f"set train.steps or train.epochs above 0 (they are {train.steps} and"
                f" {train.epochs})"
            )

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
        return [
            replace(source, mode="offline") if source.prompt.task == "chat" else source
            for source in listed
        ]

    @property
    def packing(self) -> dict:
        """How rows are filled, as options of `batching.plan` and `batching.measure`."""
        return {"pack": self.data.pack, "too_long": self.data.too_long, "seed": self.train.seed}

    @property
    def voice(self) -> PromptSettings:
        """How the trained model is asked to speak: the prompt of the first source that teaches it
        to, or of the first of all.
        """
        prompts = [source.prompt for source in self.sources]
        return next((prompt for prompt in prompts if prompt.task == "tts"), prompts[0])


def parse_settings(arguments: list[str]) -> Settings:
    """Settings from `--config FILE` and `--any.setting=value`, the later winning. UserError on an
    unknown key or a bad value.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog="llasa-jax train",
        exit_on_error=False,
        allow_abbrev=False,
        description="Finetunes a model on records.",
    )
    parser.add_argument(
        "--config", action="config", help="a YAML file with any of the settings below"
    )
    parser.add_class_arguments(Settings)
    known = _keys(Settings)
    for at, argument in enumerate(arguments):
        name, equals, value = argument.removeprefix("--").partition("=")
        if name == "config":
            _check_file(Path(value if equals else "".join(arguments[at + 1 : at + 2])), known)
        elif argument.startswith("--") and name not in ("help", "print_config"):
            _check_key(name.removesuffix("+"), "the command line", known)
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    parsed.pop("config")
    return Settings(**vars(parser.instantiate(parsed)))


def _keys(cls: type, prefix: str = "") -> set[str]:
    """Every setting's full name, and every group's."""
    keys = set()
    for field_ in fields(cls):
        keys.add(prefix + field_.name)
        # A group of settings, or a list of them, or one that may be left out.
        for group in filter(is_dataclass, (field_.type, *get_args(field_.type))):
            keys |= _keys(group, f"{prefix}{field_.name}.")
    return keys


def _check_file(path: Path, known: set[str]) -> None:
    if not path.is_file():
        raise UserError(f"the config {path} does not exist; recipes lie in configs/")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"the config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"the config {path} must hold settings as `key: value`, as the recipes in configs/ do"
        )

    def check(tree: dict, prefix: str):
        for key, value in tree.items():
            _check_key(f"{prefix}{key}", str(path), known)
            for group in value if isinstance(value, list) else [value]:
                if isinstance(group, dict):
                    check(group, f"{prefix}{key}.")

    check(content, "")


def _check_key(key: str, where: str, known: set[str]) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1, 0.0)
        raise UserError(f"unknown setting {key} in {where}; did you mean {close[0]}?")
