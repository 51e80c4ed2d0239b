"""The training loop: the next batch, a step, and what is due after it."""

import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import astuple
from functools import partial
from pathlib import Path

import grain
import jax
import numpy as np

from llasa_jax.data.batching import Source, batches, fill
from llasa_jax.encode.encoder import Encoder
from llasa_jax.encode.online import OnlineBatches
from llasa_jax.errors import UserError
from llasa_jax.evaluate.training import TrainingEvaluation
from llasa_jax.model.lora import Adapter, join
from llasa_jax.runtime import hosts
from llasa_jax.runtime.signals import StopSignal, unless
from llasa_jax.train import reference, run_folder
from llasa_jax.train.checkpoints import Checkpoints
from llasa_jax.train.goodput import Goodput
from llasa_jax.train.metrics import Metrics
from llasa_jax.train.optimizer import learning_rate_schedule
from llasa_jax.train.prepare import VALIDATION_LOSS, Job, Records, prepare
from llasa_jax.train.progress import LossAlarm, Progress, Throughput, on_host, say
from llasa_jax.train.samples import Samples
from llasa_jax.train.settings import Settings
from llasa_jax.train.state import TrainState, begin, speaking

AHEAD = 16  # batches made before they are asked for: more than one window of clips fills


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
    """`prepare` and `run` in one."""
    job = prepare(settings, records, validation)
    return run(job, codec, adapter=adapter, encoder=encoder, stop=stop)


def run(
    job: Job,
    codec: dict[str, str] | None = None,
    *,
    adapter: Adapter | None = None,
    encoder: Encoder | None = None,
    stop: StopSignal | None = None,
) -> Path:
    """Trains, or goes on where the run in `settings.out` stopped. Returns the run's folder.

    `codec`, the `codec` and `fingerprint` of what made the codes, is kept with the run. `adapter`
    is what a LoRA run begins with, if not a new one; `encoder` makes the codes of records that are
    `PlannedClips`. A signal saves a checkpoint and ends with SystemExit of 128 + its number; `stop`
    is an active signal handler, which until the first step ends the process at once. Raises
    UserError on a full disk, and on a loss that is not finite.
    """
    settings, functions = job.settings, job.functions
    # The command's signal handler is as old as the command.
    began = stop.began if stop else time.monotonic()
    pipeline = settings.packing | {"here": functions.rows_here(*astuple(job.shape))}
    held_out: Sequence[Source] = job.held_out
    with (
        run_folder.claimed(job.run, settings, codec, functions.adapters) as held,
        encoder or nullcontext(),
    ):
        if encoder:
            held_out = _encoded(held_out, encoder, job.files)
        # Closed at the end: a thread makes batches ahead.
        with closing(_batches(job, encoder, pipeline)) as data:
            on_pairs = settings.align.loss == "dpo"
            if on_pairs:
                reference.read(job)  # `begin` puts the data at its place, which makes batches
            state, checkpoints = begin(job, adapter, data)
            with (
                nullcontext(stop) if stop else StopSignal() as stop,
                checkpoints,
                job.profiler,
                job.evaluation or nullcontext(),
                Metrics(job.files, settings.log, state.step, job.run.name) as metrics,
                # Before the checkpoints are left, which would wait for the other hosts.
                hosts.failing_together(),
            ):
                if on_pairs:
                    reference.complete(job, state)
                if job.rollouts:
                    job.rollouts.begin(speaking(job, state))
                spent = Goodput(began, metrics.before, metrics.reached)
                loop = Loop(
                    job, state, data, held_out, pipeline, checkpoints, metrics, held, stop, spent
                )
                loop.run()
                stop.at_once = not hosts.stopped(stop)
                if encoder and not stop.received:
                    encoder.finish()
                say(f"time: {spent}")
                by = settings.train.keep_best_by
                if best := checkpoints.best():
                    say(
                        "the best checkpoint is that of step {}, with {} of {:.4f}".format(
                            best[0],
                            "a validation loss" if by == VALIDATION_LOSS else by,
                            best[1],
                        )
                    )
    if stop.received:
        where = (
            f"after step {state.step}, which is saved; the same command goes on from there"
            if state.step
            else "before the first step"
        )
        say(f"stopped by {signal.Signals(stop.received).name} {where}")
        raise SystemExit(128 + stop.received)
    say(f"done: {job.run}")
    return job.run


class Loop:
    """Runs the steps from `state` on, and changes it."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        data: grain.DatasetIterator,
        held_out: Sequence[Source],
        pipeline: dict,
        checkpoints: Checkpoints,
        metrics: Metrics,
        held: run_folder.Held,
        stop: StopSignal,
        spent: Goodput,
    ):
        settings, functions = job.settings, job.functions
        self.job, self.state, self.data, self.stop = job, state, data, stop
        self.held_out, self.pipeline = held_out, pipeline
        self.checkpoints, self.metrics, self.held = checkpoints, metrics, held
        self.spent, self.saved, self.save_is_due = spent, time.monotonic(), False
        self.compiled = False
        self.online = data if isinstance(data, OnlineBatches) else None
        self.validate = None
        if held_out:
            with spent.of("compile"):
                self.validate = functions.compile_validation(*astuple(job.shape))
        self.throughput = Throughput(
            functions.config, list(functions.mesh.devices.flat), functions.adapters
        )
        self.progress = Progress(
            metrics,
            self.throughput,
            LossAlarm(functions.config.vocab_size) if settings.align.loss == "supervised" else None,
            on_host(learning_rate_schedule(settings.optimizer, job.steps)),
            settings.log.every,
            job.steps,
            self.online,
        )
        spent.waited = lambda: self.throughput.waited

    def run(self) -> None:
        self.spent.started()
        while self.state.step < self.job.steps:
            batch = self.next_batch()
            if batch is None:
                break
            self.step(batch)
            self.checkpoints.check()
            self.due()
        if self.stop.received and self.state.step:
            self.progress.settle()
            self.save()

    def next_batch(self) -> dict[str, jax.Array] | None:
        """The next batch, on the devices; None after a signal, with the data back at its place."""
        place, batch, failed = self.data.get_state(), None, False
        # It goes to the devices while they compute the step before: nothing here waits for them.
        with self.throughput.waiting(self.progress.computing), jax.transfer_guard("disallow"):
            if self.online:
                failed = not self.online.wait(lambda: self.stop.received)
            if not failed and not self.stop.received:
                batch = self.place(next(self.data))
        # Only now do the hosts wait for each other, each with its batch: a step that one host does
        # not take would hang all others.
        minutes = self.job.settings.train.save_minutes
        due = 0 < minutes < (time.monotonic() - self.saved) / 60
        if hosts.preempted(self.state.step):
            self.stop.received = self.stop.received or signal.SIGTERM
        self.save_is_due = hosts.agree_to_go_on(self.stop, failed=failed, due=due)
        if self.stop.received:
            self.data.set_state(place)
            return None
        if failed:
            next(self.data)  # raises what ended its thread
        return batch

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows of a batch, on the devices."""
        return self.job.functions.place(batch, self.job.shape.rows)

    def step(self, batch: dict[str, jax.Array]) -> None:
        """Starts a step on the devices, and settles the numbers of the one before."""
        state, functions = self.state, self.job.functions
        state.step += 1
        with jax.transfer_guard("disallow"):
            self.job.profiler.before(state.step, state.trainable)
            self.spent.step(state.step)
            # The call returns once the step has begun; the first compiles it.
            with nullcontext() if self.compiled else self.spent.of("compile"):
                state.trainable, state.opt_state, numbers = functions.train(
                    state.frozen, state.trainable, state.opt_state, batch
                )
            self.compiled = True
            if self.job.rollouts and (of_round := self.job.rollouts.numbers):
                self.metrics.write(state.step, of_round)
            self.stop.at_once = False  # from here on there is something to save
            self.progress.add(state.step, numbers, self.job.shape.tokens)

    def due(self) -> None:
        """Validation, evaluation, checkpoint and samples, at the steps that ask for them and at the
        last.
        """
        step, settings = self.state.step, self.job.settings
        save, look, speak, judge = (
            every and (step == self.job.steps or step % every == 0)
            for every in (
                settings.train.save_every,
                settings.train.validate_every,
                settings.log.samples_every,
                settings.evaluate.every,
            )
        )
        save = save or self.save_is_due
        if not (save or look or speak or judge):
            return
        self.progress.settle()
        with self.throughput.pause():
            numbers: dict[str, float] = {}
            ranked = save and settings.train.keep_best
            by_loss = settings.train.keep_best_by == VALIDATION_LOSS
            if self.validate and (look or (ranked and by_loss)):
                with self.spent.of("validate"):
                    loss = self.score(self.validate)
                numbers |= {} if loss is None else {VALIDATION_LOSS: loss}
            if self.job.evaluation and (judge or (ranked and not by_loss)):
                with self.spent.of("evaluate"):
                    numbers |= self.evaluate(self.job.evaluation)
            if save:
                self.save(numbers)
            # After a signal only what must be: the time is short.
            if self.job.samples and speak and not hosts.stopped(self.stop):
                with self.spent.of("samples"):
                    self.speak(self.job.samples)

    def score(self, validate: Callable) -> float | None:
        """The validation loss, nats a target; None where a signal ended it."""
        state, shape = self.state, self.job.shape
        empty = fill([[]] * (shape.accumulation * len(self.pipeline["here"])), shape)
        every = batches(self.held_out, shape, **self.pipeline, repeat=False)
        return _validate(
            state.step,
            partial(validate, state.frozen, state.trainable),
            hosts.evenly(every, empty),
            self.place,
            self.metrics,
            self.stop,
        )

    def save(self, numbers: dict[str, float] | None = None) -> None:
        state = self.state
        with self.spent.of("save"):
            self.held.before_saving()
            self.checkpoints.save(state.step, state.trainable, state.opt_state, self.data, numbers)
        self.saved, self.save_is_due = time.monotonic(), False
        self.metrics.write(state.step, self.spent.numbers())

    def evaluate(self, evaluation: TrainingEvaluation) -> dict[str, float]:
        """Speaks and scores `evaluate.texts`; the numbers, none where a signal ended it."""
        params = join(self.state.frozen, self.state.trainable)
        graphdef = self.job.functions.graphdef

        def measure() -> dict[str, float]:
            return evaluation.numbers(evaluation.speak(graphdef, params))

        numbers = unless(lambda: self.stop.received, measure) or {}
        if numbers:
            self.metrics.write(self.state.step, numbers)
            found = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            say(f"step {self.state.step}  {found}")
        return numbers

    def speak(self, samples: Samples) -> None:
        """Speaks the texts of `log.samples`."""
        params = join(self.state.frozen, self.state.trainable)
        say_all = partial(samples.speak, self.job.functions.graphdef, params)
        # Several hosts speak together, so none may leave before the others.
        alone = jax.process_count() == 1
        waves = unless(lambda: self.stop.received, say_all) if alone else say_all()
        samples.write(self.state.step, waves or {}, self.metrics)


def _encoded(held_out: Sequence[Source], encoder: Encoder, folder: Path) -> Sequence[Source]:
    """The validation data with their codes, made now."""
    index = jax.process_index()
    encoder.skipped.list_in(folder / (f"bad.{index}.jsonl" if index else "bad.jsonl"))
    if held_out:
        say("the validation clips are encoded first")
    return encoder.held_out(held_out)


def _batches(job: Job, encoder: Encoder | None, pipeline: dict) -> grain.DatasetIterator:
    """The training batches, whose codes are there or are made while training."""
    if encoder:
        return OnlineBatches(encoder, job.sources, job.shape, **pipeline)
    if job.rollouts:
        return job.rollouts
    values = tuple(job.functions.loss.arrays)
    return iter(batches(job.sources, job.shape, ahead=AHEAD, values=values, **pipeline))


def _validate(
    step: int,
    score: Callable[[dict], dict],
    held_out: Iterable[dict],
    place: Callable[[dict], dict],
    metrics: Metrics,
    stop: StopSignal,
) -> float | None:
    """Writes the loss and accuracy over the whole validation split. Returns the loss, nats a
    target, or None where a signal ended it.
    """
    sums: dict[str, float] = {}
    for batch in held_out:
        if hosts.stopped(stop):
            return None
        for name, value in jax.device_get(score(place(batch))).items():
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
        line += "  of codes {:.1%}, in the top ten {:.1%}".format(*codes.values())
        result |= codes
    metrics.write(step, result)
    say(line)
    return result["validation_loss"]
