"""The training loop, in the order in which it happens."""

import dataclasses
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from llasa_jax.convert import model_folder
from llasa_jax.data.batching import BatchShape, Source, batches, measure, sources_of
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.online import OnlineBatches
from llasa_jax.errors import UserError
from llasa_jax.model.lora import Adapter, adapter_config, count, join, new_adapters, place, split
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime import hosts
from llasa_jax.runtime.leave import unless
from llasa_jax.runtime.stop_signal import StopSignal
from llasa_jax.speech.prompts import Conversation, Prompter, Utterance
from llasa_jax.speech.vocab import NUM_CODES
from llasa_jax.train import run_folder
from llasa_jax.train.alarm import LossAlarm
from llasa_jax.train.checkpoints import Checkpoints
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.offload import check_host_memory
from llasa_jax.train.optimizer import learning_rate_schedule, make_optimizer
from llasa_jax.train.profiler import Profiler
from llasa_jax.train.progress import Progress, say
from llasa_jax.train.samples import Samples
from llasa_jax.train.settings import Settings
from llasa_jax.train.step import TrainStep
from llasa_jax.train.throughput import Throughput

Records = Sequence[Utterance] | Sequence[Conversation]


def train(
    settings: Settings,
    records: Sequence[Records],
    validation: Sequence[Records | None] = (),
    codec: dict[str, str] | None = None,
    *,
    adapter: Adapter | None = None,
    encoder: Encoder | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Finetunes `settings.model.path` on `records`, or goes on where the run in `settings.out`
    stopped. Returns the run's folder.

    `records` are those of each of `settings.sources`, in order, and so is `validation`, None for a
    source that has none. `codec`, the `codec` and `fingerprint` of what made their codes, is kept
    with the run. `adapter` is what a LoRA run begins with, if not a new one, `encoder` makes the
    codes of records that are `PlannedClips`. Ctrl-C and SIGTERM save a checkpoint and stop with
    status 130 or 143; `stop` is what listens to them already, `at_once` so far. Raises UserError on
    settings that cannot work, on a full disk, and on a loss that is no number.
    """
    # What is asked for, and whether it can be done
    run, source = Path(settings.out), Path(settings.model.path)
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
        Source(its, each.prompter)
        for its, each in zip(validation, sources, strict=False)
        if its is not None
    ]
    vocab = sources[0].prompter.vocab
    if vocab.size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {source} has {vocab.size} tokens but the model only"
            f" {config.vocab_size}; they are no pair"
        )
    shape = BatchShape(settings.train.accumulation, settings.train.rows, settings.data.max_length)
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if shape.rows % row_devices:
        raise UserError(
            f"train.rows={shape.rows} does not divide over mesh.data x mesh.fsdp = {row_devices};"
            " choose a multiple of it"
        )
    if settings.train.keep_best and not held_out:
        raise UserError(
            "train.keep_best needs a validation loss; name a split in data.validation_split, or"
            " leave it at 0"
        )
    pipeline = settings.packing
    fit = measure(sources, shape.length, **pipeline)
    steps = settings.train.steps or fit.steps(settings.train.epochs, shape)
    say(f"an epoch: {fit} ({settings.data.too_long})")
    if len(sources) > 1:
        say(
            "its tokens: "
            + ", ".join(
                f"{share:.1%} {each.path}"
                for share, each in zip(fit.shares, settings.sources, strict=True)
            )
        )
    say(
        f"{steps} steps of {shape.tokens} tokens on {dict(mesh.shape)}"
        f" {mesh.devices.flat[0].platform} devices"
    )
    samples = (
        Samples(run, settings.log, Prompter(tokenizer, settings.voice))
        if settings.log.samples
        else None
    )
    profiler = Profiler(run, settings.profile.steps, steps)

    code_ids = range(vocab.code_base, vocab.code_base + NUM_CODES)
    check_host_memory(settings, mesh)
    adapters = adapter_config(settings.lora, config, tokenizer.get_vocab())
    kept = {
        "frozen_dtype": settings.lora.frozen_dtype,
        "quantization": settings.lora.quantize,
        "offload": settings.optimizer.offload,
    }
    options = {"adapters": adapters, "seed": settings.train.seed} | kept
    step_functions = TrainStep(
        config, settings.model, make_optimizer(settings.optimizer, steps), mesh, code_ids, **options
    )
    pipeline["process"] = (jax.process_index(), jax.process_count())

    with run_folder.claimed(run, settings, codec, adapters), encoder or nullcontext():
        # The data, whose codes are there or are made while training
        if encoder:
            encoder.skipped.list_in(
                run / (f"bad.{jax.process_index()}.jsonl" if jax.process_index() else "bad.jsonl")
            )
            if held_out:
                say("the validation clips are encoded first")
            held_out = encoder.held_out(held_out, pipeline["process"])
        data = (
            OnlineBatches(encoder, sources, shape, **pipeline)
            if encoder
            else iter(batches(sources, shape, **pipeline))
        )

        # The state, new or gone back to
        frozen, base = {}, None
        if adapters:
            frozen, trainable, base = _begin_lora(source, step_functions, adapter)
        checkpoints = Checkpoints(
            run,
            settings.train.keep,
            settings.train.keep_best,
            clips=sum(map(len, records)),
            base=base,
        )
        restored = checkpoints.restore(step_functions.trainable, step_functions.opt_state, data)
        if restored:
            start, trainable, opt_state = restored
            say(f"going on after step {start}")
        else:
            start, trainable = (
                0,
                (
                    trainable
                    if adapters
                    else model_folder.restore_params(source, step_functions.trainable)
                ),
            )
            opt_state = step_functions.init(trainable)

        validate = (
            step_functions.compile_validation(*dataclasses.astuple(shape)) if held_out else None
        )

        # The steps
        step = start
        with (
            nullcontext(stop) if stop else StopSignal() as stop,
            checkpoints,
            profiler,
            Metrics(run, settings.log, start) as metrics,
        ):
            throughput = Throughput(config, list(mesh.devices.flat), adapters)
            schedule = learning_rate_schedule(settings.optimizer, steps)
            alarm = LossAlarm(config.vocab_size)
            progress = Progress(
                metrics,
                throughput,
                alarm,
                schedule,
                settings.log.every,
                steps,
                data if encoder else None,
            )
            while step < steps:
                # The next batch goes to the devices while they are at the step before; only then
                # must the hosts wait for each other.
                place, placed = data.get_state(), None
                with throughput.waiting(progress.computing):
                    failed = encoder is not None and not data.wait(lambda: stop.received)
                    if not failed and not stop.received:
                        batch = next(data)
                        placed = _place(batch, step_functions.batch_sharding)
                if hosts.stopped(stop, failed):
                    data.set_state(place)
                    break
                if failed:
                    next(data)  # raises what ended the thread
                step += 1
                profiler.before(step, trainable)
                trainable, opt_state, numbers = step_functions.train(
                    frozen, trainable, opt_state, placed
                )
                stop.at_once = False
                progress.add(step, numbers, shape.tokens)
                checkpoints.check()

                # What comes due between steps; on a signal only what must be, for the time is short
                last, validation_loss = step == steps, None
                often = (
                    settings.train.save_every,
                    settings.train.validate_every,
                    settings.log.samples_every,
                )
                save, look, speak = (last or step % every == 0 for every in often)
                if not (save or look or speak):
                    continue
                progress.settle()
                with throughput.pause():
                    if held_out and (look or (save and settings.train.keep_best)):
                        unseen = hosts.evenly(
                            batches(held_out, shape, **pipeline, repeat=False),
                            jax.tree.map(np.zeros_like, batch),
                        )
                        score = partial(validate, frozen, trainable)
                        validation_loss = _validate(
                            step, score, unseen, step_functions.batch_sharding, metrics, stop
                        )
                    if save:
                        checkpoints.save(step, trainable, opt_state, data, validation_loss)
                    if samples and speak and not stop.received:
                        params = join(frozen, trainable)
                        waves = unless(
                            lambda: stop.received,
                            partial(samples.speak, step_functions.graphdef, params),
                        )
                        samples.write(step, waves or {}, metrics)
            if stop.received and step:
                progress.settle()
                checkpoints.save(step, trainable, opt_state, data)
        stop.at_once = not hosts.stopped(stop)
        if encoder and not stop.received:
            encoder.finish()
        if best := checkpoints.best():
            say(
                "the best checkpoint is that of step {}, with a validation loss of {:.4f}".format(
                    *best
                )
            )
    if stop.received:
        where = (
            f"after step {step}, which is saved; the same command goes on from there"
            if step
            else "before the first step"
        )
        say(f"stopped by {signal.Signals(stop.received).name} {where}")
        raise SystemExit(128 + stop.received)
    say(f"done: {run}")
    return run


def _begin_lora(
    source: Path, step_functions: TrainStep, adapter: Adapter | None
) -> tuple[dict, dict, tuple[Path, str]]:
    """The frozen and the trainable parameters before any training, and what tells the base from
    other models.
    """
    adapters, wanted = step_functions.adapters, step_functions.trainable
    base = {
        name: leaf
        for name, leaf in join(step_functions.frozen, wanted).items()
        if name not in ("lora", "rows")
    }
    params = model_folder.restore_params(source, base)
    frozen, trainable = split(params, adapters)
    trainable |= new_adapters(params, wanted, adapters, step_functions.seed)
    if adapter:
        trainable = join(trainable, place(adapter.params, wanted))
    say(
        "{:,} trained parameters beside {:,} frozen ones".format(
            *count(step_functions.config, adapters)
        )
    )
    return (
        frozen,
        trainable,
        (source, model_folder.open_model(source).fingerprint()),
    )


def _validate(
    step: int,
    score: Callable[[dict], dict],
    held_out: Iterable[dict],
    sharding: NamedSharding,
    metrics: Metrics,
    stop: StopSignal,
) -> float | None:
    """Tells the loss and accuracy over the whole validation split. Returns the loss, nats a target,
    or None where a signal ended it.
    """
    sums: dict[str, float] = {}
    for batch in held_out:
        if hosts.stopped(stop):
            return None
        for name, value in score(_place(batch, sharding)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums.get("targets"):
        raise UserError(
            "no clip of the validation split fits a row; raise data.max_length, or choose another"
            " data.validation_split"
        )
    result = {
        "validation_loss": sums["nats"] / sums["targets"],
        "validation_accuracy": sums["correct"] / sums["targets"],
    }
    line = (
        f"step {step}  validation loss {result['validation_loss']:.4f}  accuracy"
        f" {result['validation_accuracy']:.1%}"
    )
    if sums["codes"]:
        codes = {
            f"validation_{name}_accuracy": sums[name] / sums["codes"]
            for name in ("code_top1", "code_top10")
        }
        line += "  of codes {:.1%}, among the ten likeliest {:.1%}".format(*codes.values())
        result |= codes
    metrics.write(step, result)
    say(line)
    return result["validation_loss"]


def _place(batch: dict, sharding: NamedSharding) -> dict:
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
