"""The training loop, in the order in which it happens."""

import dataclasses
import signal
import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from transformers import AutoTokenizer

from llasa_jax import model_folder
from llasa_jax.batching import BatchShape, batches, measure
from llasa_jax.checkpoint import Checkpoints
from llasa_jax.errors import UserError
from llasa_jax.metrics import Metrics
from llasa_jax.optimizer import learning_rate_schedule, make_optimizer
from llasa_jax.profiler import Profiler
from llasa_jax.prompts import Prompter, Utterance
from llasa_jax.settings import Settings
from llasa_jax.sharding import make_mesh
from llasa_jax.train_step import TrainStep

SETTINGS_FILE = "settings.yaml"
# What may change between a run and its continuation: nothing that the optimizer or the order of the data depends on.
MAY_CHANGE = (
    "out",
    "mesh",
    "log",
    "train.save_every",
    "train.keep",
    "train.validate_every",
    "model.attention",
    "model.remat",
    "model.loss_chunk",
)


def train(settings: Settings, records: Sequence[Utterance], validation: Sequence[Utterance] | None = None) -> Path:
    """Finetunes `settings.model.path` on `records`, or goes on where the run in `settings.out` stopped. Returns the run's folder.

    Ctrl-C and SIGTERM save a checkpoint and stop with status 130 or 143. Raises UserError on settings that cannot work.
    """
    # What is asked for, and whether it can be done
    run, source = Path(settings.out), Path(settings.model.path)
    config, origin = model_folder.read_description(source)
    mesh = make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor, slices=settings.mesh.slices)
    prompter = Prompter(AutoTokenizer.from_pretrained(source / model_folder.HF_FOLDER), settings.prompt)
    if prompter.vocab.size > config.vocab_size:
        raise UserError(
            f"the tokenizer in {source} has {prompter.vocab.size} tokens but the model only {config.vocab_size}; they are no pair"
        )
    shape = BatchShape(settings.train.accumulation, settings.train.rows, settings.data.max_length)
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if shape.rows % row_devices:
        raise UserError(f"train.rows={shape.rows} does not divide over mesh.data x mesh.fsdp = {row_devices}; choose a multiple of it")
    fit = measure(records, prompter, shape.length)
    clips = fit.clips + (fit.too_long if settings.data.too_long == "cut" else 0)
    steps = settings.train.steps or max(1, ceil(settings.train.epochs * fit.tokens / shape.tokens))
    about = "" if fit.exact else "about "
    _say(f"{about}{clips} clips, {about}{fit.tokens} tokens; {about}{fit.too_long} too long for {shape.length} ({settings.data.too_long})")
    _say(f"{steps} steps of {shape.tokens} tokens on {dict(mesh.shape)} {mesh.devices.flat[0].platform} devices")

    # The run's folder, new or gone back to
    _prepare(run, source, settings, origin)
    step_functions = TrainStep(config, settings.model, make_optimizer(settings.optimizer, steps), mesh)
    schedule = learning_rate_schedule(settings.optimizer, steps)
    host = (jax.process_index(), jax.process_count())
    pipeline = {"pack": settings.data.pack, "too_long": settings.data.too_long, "seed": settings.train.seed, "process": host}
    data = iter(batches(records, prompter, shape, **pipeline))
    checkpoints = Checkpoints(run, settings.train.keep)
    restored = checkpoints.restore(step_functions.params, step_functions.opt_state, data)
    if restored:
        start, params, opt_state = restored
        _say(f"going on after step {start}")
    else:
        start, params = 0, model_folder.load_params(source, mesh, jnp.dtype(settings.model.param_dtype))
        opt_state = step_functions.init(params)
    metrics = Metrics(run, settings.log, start)
    profiler = Profiler(run, settings.profile.steps)

    def validate(step: int) -> None:
        if validation is None:
            return
        sums = {"nats": 0.0, "correct": 0.0, "targets": 0.0}
        for batch in batches(validation, prompter, shape, **pipeline, repeat=False):
            for name, value in step_functions.validate(params, _place(batch, step_functions)).items():
                sums[name] += float(value)
        result = {"validation_loss": sums["nats"] / sums["targets"], "validation_accuracy": sums["correct"] / sums["targets"]}
        metrics.write(step, result)
        _say(f"step {step}  validation loss {result['validation_loss']:.4f}  accuracy {result['validation_accuracy']:.1%}")

    # The steps: one is computing while the numbers of the one before are read, so that the devices never wait for the host
    stop = _StopSignal()
    clock = _Clock(shape.tokens, start, steps)
    pending: dict | None = None

    def settle() -> None:
        nonlocal pending
        if pending is None:
            return
        step = pending.pop("step")
        numbers = {name: float(value) for name, value in pending.items()}
        pending = None
        if not np.isfinite(numbers["loss"]):
            raise UserError(
                f"the loss became {numbers['loss']} at step {step}; lower optimizer.learning_rate or look at the data, and go on from the "
                f"last checkpoint in {run}"
            )
        numbers["learning_rate"] = float(schedule(step - 1))
        numbers["tokens_per_second"] = clock.tokens_per_second(step)
        metrics.write(step, numbers)
        if step % settings.log.every == 0 or step in (1, steps):
            _say(
                f"step {step}/{steps}  loss {numbers['loss']:.4f}  accuracy {numbers['accuracy']:.1%}  lr {numbers['learning_rate']:.2e}  "
                f"{numbers['tokens_per_second']:,.0f} tokens/s  {clock.remaining(step)} left"
            )

    try:
        with stop:
            for step in range(start + 1, steps + 1):
                profiler.before(step, params)
                params, opt_state, numbers = step_functions.train(params, opt_state, _place(next(data), step_functions))
                settle()
                pending = {"step": step, **numbers}
                due = step % settings.train.save_every == 0 or step == steps or stop.received
                if due:
                    settle()
                    checkpoints.save(step, params, opt_state, data)
                if step % settings.train.validate_every == 0 or step == steps:
                    settle()
                    validate(step)
                if stop.received:
                    break
    finally:
        profiler.close(params)
        checkpoints.close()
        metrics.close()
    if stop.received:
        _say(f"stopped by {signal.Signals(stop.received).name} after step {step}, which is saved; the same command goes on from there")
        raise SystemExit(128 + stop.received)
    _say(f"done: {run}")
    return run


def _place(batch: dict, step_functions: TrainStep) -> dict:
    return {name: jax.make_array_from_process_local_data(step_functions.batch_sharding, array) for name, array in batch.items()}


def _prepare(run: Path, source: Path, settings: Settings, origin: dict) -> None:
    """Makes the run's folder, or makes sure that what lies there is this very run."""
    wanted = dataclasses.asdict(settings)
    path = run / SETTINGS_FILE
    if path.is_file():
        before = _flat(yaml.safe_load(path.read_text()))
        changed = [key for key, value in _flat(wanted).items() if before.get(key) != value and not key.startswith(MAY_CHANGE)]
        if changed:
            raise UserError(
                f"the run in {run} was made with other settings ({', '.join(f'{key} was {before.get(key)}' for key in changed)}); "
                "set them back to go on, or choose another out folder"
            )
    elif run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run} already holds something that is no training run; choose another out folder")
    if jax.process_index() == 0:
        config, _ = model_folder.read_description(source)
        model_folder.copy_description(source, run)
        model_folder.write_description(run, config, {**origin, "prompt": wanted["prompt"]})
        path.write_text(yaml.safe_dump(wanted, sort_keys=False))


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


class _StopSignal:
    """Turns Ctrl-C and SIGTERM into a number to look at between steps; a second signal acts at once."""

    def __init__(self):
        self.received = 0

    def _note(self, number, frame):
        if self.received:
            signal.default_int_handler(number, frame)
        self.received = number

    def __enter__(self):
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Clock:
    """Tokens a second since the step that ended first: compiling is not part of it."""

    def __init__(self, tokens_per_step: int, start: int, steps: int):
        self._tokens, self._steps, self._first, self._since = tokens_per_step, steps, start + 1, None

    def tokens_per_second(self, step: int) -> float:
        if self._since is None:
            self._since = time.monotonic()
            return 0.0
        return self._tokens * (step - self._first) / (time.monotonic() - self._since)

    def remaining(self, step: int) -> str:
        if self._since is None or step == self._first:
            return "?"
        seconds = (time.monotonic() - self._since) / (step - self._first) * (self._steps - step)
        return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02}:{int(seconds % 60):02}"
