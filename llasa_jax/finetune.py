"""Finetuning, in the order in which it happens: settings, hosts, sources, checks, model and
tokenizer, encoder, loop.

Whatever can refuse a run does so before anything large is loaded.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llasa_jax.convert.model_folder import check_base, load_tokenizer, open_model, saved_steps
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.data.builder import dataset_fingerprint
from llasa_jax.data.records import pairs_of
from llasa_jax.data.seal import SEAL
from llasa_jax.encode.devices import share_gpu
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.encode.online_cache import open_encoder
from llasa_jax.errors import UserError
from llasa_jax.evaluate.texts import read_items
from llasa_jax.inspect.doctor import examine_before_training
from llasa_jax.model.lora import Adapter
from llasa_jax.model.settings import LoraSettings
from llasa_jax.plan.memory import out_of_memory_explained
from llasa_jax.runtime import hosts, storage
from llasa_jax.runtime.compiled import keep_programs
from llasa_jax.runtime.copies import keep_copies_in
from llasa_jax.runtime.files import folder_digest
from llasa_jax.runtime.signals import StopSignal
from llasa_jax.runtime.storage import as_path
from llasa_jax.train import loop, prepare
from llasa_jax.train.progress import say
from llasa_jax.train.run_folder import asked_as_before, flat
from llasa_jax.train.settings import Settings

# Settings that change nothing that the hosts must do together: they concern one host's own work.
MAY_DIFFER_BETWEEN_HOSTS = (
    *("log.tensorboard", "log.wandb", "mesh.start_timeout", "data.online.device"),
    *("data.online.workers", "data.online.torch_threads", "data.online.read_ahead"),
    *("mesh.coordinator", "mesh.process_index", "mesh.compiled"),
    *("data.online.queue", "data.online.gpu_memory", "data.online.stall_seconds"),
    "data.cache_dir",
)


def finetune(settings: Settings, stop: StopSignal) -> Path:
    """Trains as `settings` say, or goes on where the run in `settings.out` stopped. Returns the
    run's folder.

    `stop` is an active signal handler. Raises UserError on what cannot work, and SystemExit of 128
    plus its number after a signal.
    """
    with hosts.together():
        check_buckets(settings)
        join_hosts(settings, stop)
        given, (settings, adapter) = settings.prompt, begin_with(settings)
        if settings.prompt != given:
            say(f"the prompt is the model's own: {settings.prompt.user!r}, as it was trained")
        if settings.align.loss == "grpo":
            return finetune_by_speaking(settings, adapter, stop)
        # Sources: opened once, for the checks and for training.
        records, validation = open_sources(settings.sources, settings.data.online)
        # Checks: what the hosts see, what the data says, what model, mesh and data say together.
        compare_hosts(settings, records)
        examine_before_training(settings, (records, validation))
        if settings.align.loss == "dpo":
            records = [*pairs_of(records)]
        job = prepare.prepare(settings, records, validation)
        # The codec of online training, and the readers of its audio.
        encoder = open_encoder(settings.data.online, records, validation, out=settings.out)
        codec = codec_of(settings.sources, encoder.codec if encoder else None)
        with out_of_memory_explained(settings):
            return loop.run(job, codec, adapter=adapter, encoder=encoder, stop=stop)


def finetune_by_speaking(settings: Settings, adapter: Adapter | None, stop: StopSignal) -> Path:
    """`finetune` where the data are texts that the model speaks while it is trained."""
    items: Sequence = read_items(settings.data.path)
    job = prepare.prepare(settings, [items])
    assert job.rollouts is not None
    codec = job.rollouts.codec
    with out_of_memory_explained(settings):
        about = {"codec": codec.name, "fingerprint": codec.fingerprint}
        return loop.run(job, about, adapter=adapter, stop=stop)


def check_buckets(settings: Settings) -> None:
    """UserError where a bucket that the settings name cannot be reached, or written to. Says where
    copies of what is read from buckets go.
    """
    keep_copies_in(settings.data.cache_dir)
    storage.check_writable(settings.out)
    if settings.mesh.compiled != "off":
        storage.check_writable(settings.mesh.compiled)
    online = [source for source in settings.sources if source.mode == "online"]
    if online and settings.data.online.cache:
        storage.check_writable(settings.data.online.cache)
    read = {"the model": [settings.model.path], "the adapter": [settings.lora.init]}
    read["the recording"] = [settings.evaluate.reference] if settings.evaluate.every else []
    read["the dataset"] = [source.path for source in settings.sources]
    read["the codec"] = [settings.data.online.codec] if online else []
    read["the codec"] += (
        [settings.log.codec] if settings.log.samples or settings.evaluate.every else []
    )
    for what, paths in read.items():
        for path in filter(None, paths):
            if not path.startswith("hf://"):  # of the hub, which is asked later
                storage.check_reachable(path, what)


def join_hosts(settings: Settings, stop: StopSignal) -> None:
    """Lets JAX find its devices, and the other hosts where there are several: their settings and
    programs are compared first. UserError where they differ or do not come.
    """
    keep_programs(settings.mesh.compiled)
    if any(source.mode == "online" for source in settings.sources):
        # JAX takes its memory when it first looks for devices, so the codec's share is set before.
        share_gpu(settings.data.online)
    mesh = settings.mesh
    if not mesh.joins:
        hosts.check_alone()
        return
    stop.before_end = hosts.end_by_signal
    facts = hosts.software() | {
        name: value
        for name, value in flat(dataclasses.asdict(settings)).items()
        if name not in MAY_DIFFER_BETWEEN_HOSTS
    }
    given = hosts.Given(mesh.coordinator, mesh.process_count, mesh.process_index)
    fix = "give every host the same command, files and versions"
    hosts.join(given, mesh.start_timeout, facts, fix)
    stop.listen()  # jax.distributed has put its own handler in place of ours


def compare_hosts(settings: Settings, records: Sequence[Sequence]) -> None:
    """Makes sure that all hosts write to one folder, and see the same model, the same data and the
    same kind of devices. UserError on all of them, naming what differs.
    """
    if not hosts.several():
        return
    written = {"out": settings.out, "data.online.cache": settings.data.online.cache}
    for name, folder in written.items():
        if folder and not storage.is_remote(folder):
            hosts.check_shared(Path(folder), name)
    facts: dict[str, object] = {
        "the devices of a host": hosts.devices(),
        "the model": folder_digest(open_model(settings.model.path).folder),
    }
    for source, clips in zip(settings.sources, records, strict=True):
        facts[f"the number of clips of {source.path}"] = len(clips)
        facts[f"the content of {source.path}"] = source_digest(source.path)
    hosts.agree(facts, "give every host the same model and data, best on a shared file system")


def source_digest(path: str) -> str:
    """Tells a dataset, a manifest or another source by its content, or by its name where it is on
    the hub.
    """
    if (as_path(path) / SEAL).is_file():
        return dataset_fingerprint(path)
    return folder_digest(as_path(path)) if as_path(path).exists() else path


def begin_with(settings: Settings) -> tuple[Settings, Adapter | None]:
    """The settings with those of the adapter in `lora.init`, and that adapter; None in its place
    where none is named. The prompt is what the model was trained with, where none is given.

    Rank, alpha, targets and the like are the adapter's, and need not be given. UserError where they
    are given and differ, and where the run to go on with has lost its base.
    """
    lora, base, run = settings.lora, as_path(settings.model.path), as_path(settings.out)
    if saved_steps(run) and lora.rank:
        check_base(run, base)
    if not lora.init:
        return asked_as_before(settings), None
    adapter = open_adapter(as_path(lora.init), base)
    config = adapter.config
    tokens = load_tokenizer(base).convert_ids_to_tokens(list(config.token_ids))
    fixed: dict[str, Any] = {
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": list(config.targets),
        "rslora": config.rslora,
        "train_also": [*config.modules, *tokens],
    }
    default = LoraSettings()
    for name, value in fixed.items():
        given = getattr(lora, name)
        same = sorted(given) == sorted(value) if isinstance(value, list) else given == value
        if not same and given != getattr(default, name):
            raise UserError(
                f"lora.{name} is {given}, but the adapter in {lora.init} has {value}; leave"
                f" lora.{name} out to go on from it"
            )
    settings = dataclasses.replace(settings, lora=dataclasses.replace(lora, **fixed))
    return asked_as_before(settings, adapter.prompt), adapter
