"""What training changes, step by step: new, or that of the newest checkpoint."""

from dataclasses import astuple, dataclass, field
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np

from llasa_jax.align.rollouts import Trained
from llasa_jax.convert import model_folder
from llasa_jax.data.batching import streams_of
from llasa_jax.model.config import AdapterConfig
from llasa_jax.model.lora import Adapter, count, join, new_adapters, put_on_devices, split
from llasa_jax.runtime import hosts
from llasa_jax.train.checkpoints import Checkpoints
from llasa_jax.train.prepare import Job
from llasa_jax.train.progress import say
from llasa_jax.train.step import TrainStep


@dataclass
class TrainState:
    """What a step changes, and the frozen parameters beside it. `step` counts the steps done.
    `first` is `trainable` before any of them, where GRPO has it as the reference.
    """

    step: int
    frozen: dict
    trainable: dict
    opt_state: object
    first: dict = field(default_factory=dict)


def begin(
    job: Job, adapter: Adapter | None, data: grain.DatasetIterator
) -> tuple[TrainState, Checkpoints]:
    """The state, new or that of the newest checkpoint, with `data` at its place."""
    settings, functions = job.settings, job.functions
    frozen: dict = {}
    trainable, base = None, None
    if functions.adapters:
        frozen, trainable, base = _begin_lora(job.source, functions, functions.adapters, adapter)
    checkpoints = Checkpoints(
        job.run,
        settings.train.keep,
        settings.train.keep_best,
        best_by=settings.train.keep_best_by,
        highest=job.best_is_highest,
        clips=job.clips,
        base=base,
        data=job.dataset,
        streams=settings.streams,
        here=streams_of(functions.rows_here(*astuple(job.shape)), job.shape.rows, settings.streams),
    )
    try:
        with hosts.failing_together():  # innermost: to leave checkpoints waits for the other hosts
            return _state(job, checkpoints, frozen, trainable, data), checkpoints
    except BaseException as error:
        # Or Orbax's threads fail as Python ends, and print a traceback after the sentence.
        checkpoints.__exit__(type(error), error, None)
        raise


def _state(
    job: Job,
    checkpoints: Checkpoints,
    frozen: dict,
    trainable: dict | None,
    data: grain.DatasetIterator,
) -> TrainState:
    """`trainable` are a LoRA run's, before any training; None where the model itself is trained."""
    functions, align = job.functions, job.settings.align
    has_reference = align.loss == "grpo" and align.grpo.kl > 0
    restored = checkpoints.restore(functions.trainable, functions.opt_state, data)
    if trainable is None and (has_reference or not restored):
        trainable = model_folder.restore_params(job.source, functions.trainable)
    first = trainable if trainable and has_reference else {}
    if restored:
        step, trained, opt_state = restored
        say(f"going on after step {step}")
        return TrainState(step, frozen, trained, opt_state, first)
    assert trainable is not None
    # A step takes over the memory of what it changes, so the reference is a copy: of the adapters,
    # whose base is there already, or in full finetuning of all weights.
    first = jax.tree.map(jnp.copy, first)
    return TrainState(0, frozen, trainable, functions.init(trainable), first)


def _begin_lora(
    source: Path, functions: TrainStep, adapters: AdapterConfig, adapter: Adapter | None
) -> tuple[dict, dict, tuple[Path, str]]:
    """The frozen and the trainable parameters before any training, and the folder and fingerprint
    of the base.
    """
    wanted = functions.trainable
    base = {
        name: leaf
        for name, leaf in join(functions.frozen, wanted).items()
        if name not in ("lora", "rows")
    }
    params = model_folder.restore_params(source, base)
    frozen, trainable = split(params, adapters)
    trainable |= new_adapters(params, wanted, adapters, functions.seed)
    if adapter:
        trainable = join(trainable, put_on_devices(adapter.params, wanted))
    say(
        "{:,} trained parameters beside {:,} frozen ones".format(*count(functions.config, adapters))
    )
    return frozen, trainable, (source, model_folder.open_model(source).fingerprint())


def speaking(job: Job, state: TrainState) -> Trained:
    """What GRPO's rollouts take of a run: the weights as they are now, without a copy, and those
    that the run began with.
    """
    functions = job.functions

    def log_probs(batch: dict, trainable: dict) -> np.ndarray:
        placed = functions.place(batch, job.shape.rows)
        return jax.device_get(functions.log_probs(state.frozen, trainable, placed))

    return Trained(
        functions.graphdef,
        lambda: join(state.frozen, state.trainable),
        lambda batch: log_probs(batch, state.trainable),
        lambda batch: log_probs(batch, state.first),
    )
