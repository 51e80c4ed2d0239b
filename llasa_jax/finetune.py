"""Finetuning, in the order in which it happens: settings, hosts, adapter, records, codec, checks,
training.
"""

import dataclasses
from pathlib import Path

from llasa_jax.convert.model_folder import check_base, load_tokenizer, saved_steps
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.encode.encoder import share_gpu
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.encode.online_cache import open_encoder
from llasa_jax.errors import UserError
from llasa_jax.inspect.doctor import examine_before_training
from llasa_jax.model.lora import Adapter
from llasa_jax.model.settings import LoraSettings
from llasa_jax.plan.memory import out_of_memory_explained
from llasa_jax.runtime.stop_signal import StopSignal
from llasa_jax.train import loop
from llasa_jax.train.settings import Settings


def finetune(settings: Settings, stop: StopSignal) -> Path:
    """Trains as `settings` say, or goes on where the run in `settings.out` stopped. Returns the
    run's folder.

    `stop` listens to SIGINT and SIGTERM. Raises UserError on what cannot work.
    """
    if any(source.mode == "online" for source in settings.sources):
        # JAX takes its memory when it first looks for devices, so the codec's share is set before
        # that.
        share_gpu(settings.data.online)
    if settings.mesh.hosts:
        import jax

        jax.distributed.initialize()
        # jax.distributed has put its own handler in place of ours.
        stop.listen()
    settings, adapter = begin_with(settings)
    records, validation = open_sources(settings.sources, settings.data.online)
    encoder = open_encoder(settings.data.online, records, validation)
    codec = codec_of(settings.sources, encoder and encoder.codec)
    examine_before_training(settings)
    with out_of_memory_explained(settings):
        return loop.train(
            settings, records, validation, codec, adapter=adapter, encoder=encoder, stop=stop
        )


def begin_with(settings: Settings) -> tuple[Settings, Adapter | None]:
    """The settings with those of the adapter in `lora.init`, and that adapter; just the settings
    where none is named.

    Rank, alpha, targets and the like are the adapter's, and need not be given. UserError where they
    are and differ, and where the run to go on with has lost its base.
    """
    lora, base, run = settings.lora, Path(settings.model.path), Path(settings.out)
    if saved_steps(run) and lora.rank:
        check_base(run, base)
    if not lora.init:
        return settings, None
    adapter = open_adapter(Path(lora.init), base)
    its = adapter.config
    tokens = load_tokenizer(base).convert_ids_to_tokens(list(its.rows))
    told = {
        "rank": its.rank,
        "alpha": its.alpha,
        "targets": list(its.targets),
        "rslora": its.rslora,
        "train_also": [*its.modules, *tokens],
    }
    default = LoraSettings()
    for name, value in told.items():
        given = getattr(lora, name)
        same = sorted(given) == sorted(value) if isinstance(value, list) else given == value
        if not same and given != getattr(default, name):
            raise UserError(
                f"lora.{name} is {given}, but the adapter in {lora.init} has {value}; leave"
                f" lora.{name} out to go on from it"
            )
    return dataclasses.replace(settings, lora=dataclasses.replace(lora, **told)), adapter
