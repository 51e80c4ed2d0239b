"""What is to be trained, and whether it can be: everything that is known before the weights are
loaded, and that may refuse a run in seconds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import cast

import numpy as np

from llasa_jax.align.rollouts import Rollouts
from llasa_jax.codec import load_codec
from llasa_jax.convert import model_folder
from llasa_jax.data.batching import BatchShape, Source, measure, sources_of
from llasa_jax.data.seal import read_seal
from llasa_jax.errors import UserError
from llasa_jax.evaluate.checkpoints import texts_fingerprint
from llasa_jax.evaluate.texts import Item
from llasa_jax.evaluate.training import TrainingEvaluation
from llasa_jax.generate.speaker import check_codec
from llasa_jax.model.lora import adapter_config
from llasa_jax.model.sharding import make_mesh, row_devices, shares_rows
from llasa_jax.runtime.bucket_files import working_folder
from llasa_jax.runtime.storage import as_path
from llasa_jax.speech.prompts import Conversation, Pair, Prompter, Utterance
from llasa_jax.speech.vocab import NUM_CODES
from llasa_jax.train.offload import check_host_memory
from llasa_jax.train.optimizer import make_optimizer
from llasa_jax.train.profiler import Profiler
from llasa_jax.train.progress import say
from llasa_jax.train.samples import Samples
from llasa_jax.train.settings import Settings
from llasa_jax.train.step import TrainStep

Records = Sequence[Utterance] | Sequence[Conversation] | Sequence[Pair]
VALIDATION_LOSS = "validation_loss"  # what train.keep_best_by is by default
LOOKED_AT = 64  # records of a dataset that its fingerprint is made from


@dataclass(frozen=True)
class Job:
    """A training run that can work. `held_out` are the validation data, `clips` and `dataset` the
    number and the fingerprint of the training records. `rollouts` makes GRPO's batches.
    """

    settings: Settings
    functions: TrainStep
    sources: list[Source]
    held_out: list[Source]
    shape: BatchShape
    steps: int
    clips: int
    dataset: str
    samples: Samples | None
    evaluation: TrainingEvaluation | None
    profiler: Profiler
    rollouts: Rollouts | None = None

    @property
    def run(self) -> Path:
        return as_path(self.settings.out)

    @property
    def files(self) -> Path:
        """Where this process writes the run's small files: the run's folder, or for a bucket one on
        this machine.
        """
        return working_folder(self.settings.out)

    @property
    def best_is_highest(self) -> bool:
        """Whether the best checkpoint is the one with the highest `train.keep_best_by`."""
        known = self.evaluation.higher_is_better if self.evaluation else {}
        return known.get(self.settings.train.keep_best_by, False)

    @property
    def source(self) -> Path:
        return as_path(self.settings.model.path)


def prepare(
    settings: Settings, records: Sequence[Records], validation: Sequence[Records | None] = ()
) -> Job:
    """The job that `settings` describe, on `records`, those of each of `settings.sources` in order;
    so is `validation`, None for a source that has none.

    Says how long an epoch is. Raises UserError on what cannot work.
    """
    source = as_path(settings.model.path)
    config, origin = model_folder.read_description(source)
    if "lora" in origin:
        raise UserError(
            f"{source} is a LoRA run; merge it (`export-hf --lora merge`, then `import-hf`), or go"
            " on from it with lora.init"
        )
    mesh = make_mesh(
        settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, slices=settings.mesh.slices
    )
    tokenizer = model_folder.load_tokenizer(source)
    sources = sources_of(settings.sources, tokenizer, records)
    held_out = [
        Source(held, each.prompter)
        for held, each in zip(validation, sources, strict=False)
        if held is not None
    ]
    vocab = sources[0].prompter.vocab
    if vocab.size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {source} has {vocab.size} tokens but the model only"
            f" {config.vocab_size}; the tokenizer does not match the model"
        )
    shape = BatchShape(settings.train.accumulation, settings.train.rows, settings.data.max_length)
    row_devices(mesh, shape.rows)
    if shares_rows(mesh) and any(source.mode == "online" for source in settings.sources):
        # A clip that only one of them cannot read would be in the row of one, not of the other.
        raise UserError(
            f"mesh.tensor={mesh.shape['tensor']} goes across hosts, which would have to encode the"
            " same clips online; choose at most the devices of one host, or data.mode=offline"
        )
    best_by = settings.train.keep_best_by
    if settings.train.keep_best and best_by == VALIDATION_LOSS and not held_out:
        raise UserError(
            "train.keep_best needs a validation loss; name a split in data.validation_split, or"
            " leave it at 0"
        )
    if best_by != VALIDATION_LOSS and not settings.evaluate.every:
        raise UserError(
            f"train.keep_best_by is {best_by}, which no evaluation finds; set evaluate.every, or"
            f" leave it at {VALIDATION_LOSS}"
        )

    rollouts = None
    if settings.align.loss == "grpo":  # loads a codec, and starts a process
        rollouts = _rollouts(settings, records, sources[0].prompter, shape)
        rounds = rollouts.rounds_per_epoch
        steps = settings.train.steps or ceil(
            settings.train.epochs * rounds * settings.align.grpo.updates
        )
        rollouts.last = ceil(steps / settings.align.grpo.updates)
        say(f"an epoch: {rounds} rounds of {settings.align.grpo.texts} texts")
    else:
        fit = measure(sources, shape.length, **settings.packing)
        steps = settings.train.steps or fit.steps(settings.train.epochs, shape)
        say(f"an epoch: {fit} ({settings.data.too_long})")
    if len(sources) > 1:
        shares = zip(fit.shares, settings.sources, strict=True)
        say("its tokens: " + ", ".join(f"{share:.1%} {each.path}" for share, each in shares))
    say(
        f"{steps} steps of {shape.tokens} tokens on {dict(mesh.shape)}"
        f" {mesh.devices.flat[0].platform} devices"
    )

    check_host_memory(settings, mesh)
    functions = TrainStep(
        config,
        settings.model,
        make_optimizer(settings.optimizer, steps),
        mesh,
        range(vocab.code_base, vocab.code_base + NUM_CODES),
        adapters=adapter_config(settings.lora, config, tokenizer.get_vocab()),
        seed=settings.train.seed,
        **settings.step_options,
    )
    profiler = Profiler(working_folder(settings.out), settings.profile.steps, steps)
    samples = evaluation = None
    prompter = Prompter(tokenizer, settings.voice)
    if settings.log.samples:  # loads a codec, so it comes last
        samples = Samples(working_folder(settings.out), settings.log, prompter)
    if settings.evaluate.every:  # so does this, and starts a process
        log = settings.log
        evaluation = TrainingEvaluation(settings.evaluate, prompter, log.codec, log.codec_device)
        known = evaluation.higher_is_better
        if best_by not in (VALIDATION_LOSS, *known):
            raise UserError(
                f"train.keep_best_by is {best_by}, which evaluate.scorers do not measure; choose"
                f" {VALIDATION_LOSS} or one of {', '.join(known)}"
            )
    return Job(
        settings,
        functions,
        sources,
        held_out,
        shape,
        steps,
        clips=sum(map(len, records)),
        dataset=(
            texts_fingerprint(cast("Sequence[Item]", records[0]))
            if rollouts
            else fingerprint(settings, records)
        ),
        samples=samples,
        evaluation=evaluation,
        profiler=profiler,
        rollouts=rollouts,
    )


def _rollouts(
    settings: Settings, records: Sequence[Records], prompter: Prompter, shape: BatchShape
) -> Rollouts:
    """What speaks and rates the texts."""
    log = settings.log
    codec = load_codec(log.codec, log.codec_device)
    check_codec(as_path(settings.model.path), codec)
    return Rollouts(
        settings.align.grpo,
        cast("Sequence[Item]", records[0]),
        prompter,
        codec,
        shape,
        working_folder(settings.out),
        settings.train.seed,
    )


def fingerprint(settings: Settings, datasets: Sequence[Records]) -> str:
    """What tells training data from others of the same size: a hash of every dataset's own
    fingerprint, or where it has none of its size and of some records, evenly spread.
    """
    found = hashlib.sha256()
    for source, records in zip(settings.sources, datasets, strict=True):
        folder = as_path(source.path)
        known = read_seal(folder).get("records") if folder.is_dir() else None
        found.update(f"{source.split} {len(records)} {known}\n".encode())
        at = np.linspace(0, len(records) - 1, min(LOOKED_AT, len(records))).astype(int)
        for record in () if known else (records[int(i)] for i in at):
            words: object
            if isinstance(record, Pair):
                found.update(np.asarray(record.worse.codes, "<u2").tobytes())
                record = record.better  # noqa: PLW2901
            if isinstance(record, Utterance):
                words = (record.id, record.text, record.speaker, record.language)
                # None where they are made while training
                codes = b"" if record.codes is None else np.asarray(record.codes, "<u2").tobytes()
                found.update(codes)
            else:  # a conversation, or None for audio that cannot be read
                words = record and (record.id, record.messages)
            found.update(repr(words).encode(errors="surrogateescape"))
    return found.hexdigest()[:16]
