"""A run's folder: claimed by one process at a time, made for one set of settings, and never half
made.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import yaml

from llasa_jax.convert import model_folder
from llasa_jax.errors import UserError
from llasa_jax.model.config import AdapterConfig
from llasa_jax.runtime.files import explain, is_partial, read_yaml, take_lock, write_whole
from llasa_jax.runtime.settings import may_change
from llasa_jax.train.settings import Settings

SETTINGS_FILE, LOCK_FILE = "settings.yaml", ".lock"


@contextmanager
def claimed(
    run: Path,
    settings: Settings,
    codec: dict[str, str] | None = None,
    adapters: AdapterConfig | None = None,
) -> Iterator[None]:
    """Makes the run's folder, or makes sure that what lies there is this very run, and holds it
    against other processes.

    `codec` says what made the training codes: it is kept in `model.json`, beside the prompt to
    generate with and a LoRA run's `adapters`. UserError where another process trains there, where
    the folder holds something else, and (at any time inside) where its disk is full.
    """
    try:
        wanted = dataclasses.asdict(settings)
        _check(run, wanted)
        if jax.process_index():
            yield
            return
        run.mkdir(parents=True, exist_ok=True)
        with (run / LOCK_FILE).open("w") as lock:
            # Without locks on its file system: better no guard than no training.
            if take_lock(lock) is False:
                raise UserError(
                    f"another process is training in {run}; wait for its end or stop it, or choose"
                    " another out folder"
                )
            write_whole(run / SETTINGS_FILE, yaml.safe_dump(wanted, sort_keys=False))
            source = Path(settings.model.path)
            config, origin = model_folder.read_description(source)
            model_folder.copy_description(source, run)
            kept = {"prompt": dataclasses.asdict(settings.voice)} | (
                {"codec": codec} if codec else {}
            )
            if adapters:
                its = {"adapters": dataclasses.asdict(adapters), "quantize": settings.lora.quantize}
                # A hub id stays what it is.
                base = source.absolute() if source.exists() else source
                kept["lora"] = {"base": str(base)} | its
            model_folder.write_description(run, config, origin | kept)
            yield
    except OSError as error:
        raise UserError(explain(error, run)) from error


def _check(run: Path, wanted: dict) -> None:
    path = run / SETTINGS_FILE
    if path.is_file():
        fix = "choose another out folder, or restore the file from a copy"
        before = _flat(read_yaml(path, "the run's settings", fix=fix))
        changed = [
            key
            for key, value in _flat(wanted).items()
            if before.get(key) != value and key not in may_change(Settings)
        ]
        if changed:
            raise UserError(
                f"the run in {run} was made with other settings"
                f" ({', '.join(f'{key} was {before.get(key)}' for key in changed)}); set them back"
                " to go on, or choose another out folder"
            )
    elif run.is_dir() and any(
        entry.name != LOCK_FILE and not is_partial(entry) for entry in run.iterdir()
    ):
        raise UserError(
            f"{run} already holds something that is no training run; choose another out folder"
        )


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
