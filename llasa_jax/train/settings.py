"""All settings of a training run, as a YAML file spells them. A recipe in `configs/` is the
experiment.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from llasa_jax.align.losses import loss_of
from llasa_jax.align.settings import AlignSettings
from llasa_jax.data.settings import SourceSettings
from llasa_jax.encode.settings import DataSettings
from llasa_jax.errors import UserError
from llasa_jax.evaluate.settings import EvaluateSettings
from llasa_jax.model.settings import Dtype, LoraSettings, MeshSettings, ModelSettings
from llasa_jax.runtime.settings import (
    CODEC_DEVICE,
    DEVICE_WORDS,
    MAX_SEED,
    check,
    group,
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
    align: AlignSettings = group(AlignSettings)
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
        if self.align.loss == "dpo":
            self._check_pairs()
        if self.align.loss == "grpo":
            self._check_texts()
        tokens = self.train.rows * self.train.accumulation * self.data.max_length
        if tokens > MAX_TOKENS:
            raise UserError(
                f"train.rows x train.accumulation x data.max_length is {tokens:,} tokens per step;"
                f" it must be at most {MAX_TOKENS:,}"
            )
        traced_steps(self.profile.steps, self.train.steps)

    def _check_pairs(self) -> None:
        """UserError where the data cannot be pairs."""
        if self.data.too_long == "cut":
            raise UserError(
                "data.too_long is cut, and a pair that is cut has lost what ranks it; leave it at"
                " drop"
            )
        for source in self.sources:
            if source.mode == "online" or (source.prompt and source.prompt.task != "tts"):
                raise UserError(
                    f"align.loss is dpo, and {source.path} is no dataset of pairs of speech: its"
                    " mode must be offline and its prompt's task tts; make one with `llasa-jax"
                    " prefer`"
                )

    def _check_texts(self) -> None:
        """UserError where the data cannot be texts to speak."""
        data = self.data
        if data.sources or data.validation_split or data.mode == "online":
            raise UserError(
                "align.loss is grpo, whose data are texts to speak: give one list of them as"
                " data.path, and leave data.sources, data.validation_split and data.mode out"
            )
        if self.prompt.task != "tts":
            raise UserError("align.loss is grpo, which needs prompt.task tts")
        if not self.log.codec:
            raise UserError(
                "align.loss grpo needs log.codec, which turns codes into sound; give a codec's"
                " folder or hub id"
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
        return [replace(source, mode="offline") if source.is_chat else source for source in listed]

    @property
    def streams(self) -> int:
        """How many streams the data is cut into: the largest power of two that divides the rows and
        leaves each stream `STREAM_ROWS`, if no other number is set.
        """
        if self.data.streams or self.align.loss == "grpo":  # whose rounds come one by one
            return self.data.streams or 1
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
        """What a `TrainStep` needs to know besides the model: how weights and state are kept, and
        the loss.
        """
        return {
            "frozen_dtype": self.lora.frozen_dtype,
            "quantization": self.lora.quantize,
            "offload": self.optimizer.offload,
            "loss": loss_of(self.align),
        }

    @property
    def voice(self) -> PromptSettings:
        """How the trained model is asked to speak: the prompt of the first source that teaches it
        to, or of the first of all.
        """
        prompts = [source.prompt for source in self.sources if source.prompt]
        return next((prompt for prompt in prompts if prompt.task == "tts"), prompts[0])
