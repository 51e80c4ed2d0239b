"""A run's folder: claimed by one process at a time, made for one set of settings, and never half
made.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import yaml

from llasa_jax.convert import model_folder
from llasa_jax.data.settings import SourceSettings
from llasa_jax.errors import UserError
from llasa_jax.model.config import AdapterConfig
from llasa_jax.runtime.bucket_files import Mirror, working_folder
from llasa_jax.runtime.claims import CLAIMS, Claim
from llasa_jax.runtime.files import explain, read_yaml
from llasa_jax.runtime.settings import may_change
from llasa_jax.runtime.storage import absolute, as_path, is_remote, reaching
from llasa_jax.runtime.writing import is_partial, take_lock, write_whole
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.train.settings import Settings

SETTINGS_FILE, LOCK_FILE = "settings.yaml", ".lock"
BEGUN_WITH = "begun_with"  # in `model.json`: the fingerprint of the model that a run began with
GROWING = ["metrics.jsonl", "bad.jsonl"]  # files that a run goes on with


@dataclass(frozen=True)
class Held:
    """A run's folder that this process may write. In a bucket, its small files are written on this
    machine, in `working_folder`, and put up as they grow.
    """

    claim: Claim
    mirror: Mirror

    def before_saving(self) -> None:
        """What a checkpoint asks for: that the folder is still ours, and that the numbers up to
        there are in it. UserError where another process has taken over.
        """
        self.claim.check()
        self.mirror.sync()


@contextmanager
def claimed(
    run: Path,
    settings: Settings,
    codec: dict[str, str] | None = None,
    adapters: AdapterConfig | None = None,
) -> Iterator[Held]:
    """Makes the run's folder, or makes sure that what lies there is this very run, and holds it
    against other processes.

    `codec` says what made the training codes: it is kept in `model.json`, beside the prompt to
    generate with and a LoRA run's `adapters`. UserError where another process trains there, where
    the folder holds something else, and (at any time inside) where it cannot be read or written.
    """
    files = working_folder(run)
    held = Held(Claim(run, "training"), Mirror(files, run))
    try:
        # The weights of a Hugging Face checkpoint are read for it, so once at most.
        fingerprint = functools.cache(model_folder.open_model(settings.model.path).fingerprint)
        with reaching(run):
            _check(run, settings, codec, fingerprint)
        if jax.process_index():
            with held.mirror:
                yield held
            return
        with held.claim, _locked(run):
            values = _plain(dataclasses.asdict(settings))
            write_whole(run / SETTINGS_FILE, yaml.safe_dump(values, sort_keys=False))
            held.mirror.fetch(GROWING)
            _describe(files, settings, codec, adapters, fingerprint)
            held.mirror.sync(forgive=False)
            with held.mirror:
                yield held
    except OSError as error:
        raise UserError(explain(error, run)) from error


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Makes a folder of this machine, and locks it; in a bucket, the claim is the lock."""
    if is_remote(run):
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
        yield


def _describe(
    run: Path,
    settings: Settings,
    codec: dict | None,
    adapters: AdapterConfig | None,
    fingerprint: Callable[[], str],
) -> None:
    """Makes the folder a model's (see `model_folder`), with the tokenizer and `model.json`."""
    source = as_path(settings.model.path)
    model = model_folder.open_model(source)
    model_folder.copy_description(source, run)
    origin = model.origin | {"prompt": dataclasses.asdict(settings.voice)}
    # A LoRA run's checkpoints have their base's fingerprint: Hugging Face's would be read twice.
    if not (adapters and model.is_hf):
        origin[BEGUN_WITH] = fingerprint()
    if codec:
        origin["codec"] = codec
    if adapters:
        origin["lora"] = {
            # The id of a model on the hub stays what it is.
            "base": str(absolute(source) if source.exists() else source),
            "adapters": dataclasses.asdict(adapters),
            "quantize": settings.lora.quantize,
        }
    model_folder.write_description(run, model.config, origin)


def _check(
    run: Path, settings: Settings, codec: dict | None, fingerprint: Callable[[], str]
) -> None:
    path = run / SETTINGS_FILE
    if path.is_file():
        fix = "restore the file from a copy, or choose another out folder"
        before = read_yaml(path, "the run's settings", fix=fix)
        if not before:
            raise UserError(f"{path}: the run's settings are empty; {fix}")
        changed = changes(before, settings)
        if changed:
            raise UserError(
                f"the run in {run} was made with other settings"
                f" ({', '.join(f'{key} was {value}' for key, value in changed.items())}); set them"
                " back to go on, or choose another out folder"
            )
        _check_model(run, settings.model.path, codec or {}, fingerprint)
    elif run.is_dir() and any(
        entry.name not in (LOCK_FILE, CLAIMS) and not is_partial(entry) for entry in run.iterdir()
    ):
        raise UserError(
            f"{run} already holds something that is no training run; choose another out folder"
        )


def _check_model(run: Path, path: str, codec: dict, fingerprint: Callable[[], str]) -> None:
    """UserError where a run that has learned something was begun with another model than the one at
    `path`, a folder or hub id, or with codes of another codec.
    """
    if not model_folder.saved_steps(run):
        return
    try:
        config, origin = model_folder.read_description(run)
    except UserError:
        return  # it is damaged, and written again from the model
    model = model_folder.open_model(path)
    files = [folder / "tokenizer.json" for folder in (run / model_folder.HF_FOLDER, model.files)]
    same = config == model.config
    if same and all(file.is_file() for file in files):
        same = files[0].read_bytes() == files[1].read_bytes()
    if same and BEGUN_WITH in origin:
        same = origin[BEGUN_WITH] == fingerprint()
    if not same:
        raise UserError(
            f"the run in {run} was begun with another model than the one in {path}; set"
            " model.path to that model or a copy of it, or choose another out folder"
        )
    before = origin.get("codec") or {}
    prints = [each.get("fingerprint") for each in (before, codec)]
    if all(prints) and prints[0] != prints[1]:
        raise UserError(
            f"the run in {run} was begun with codes of {before.get('codec')} (fingerprint"
            f" {prints[0]}), not of {codec.get('codec')} ({prints[1]}); go on with that codec, or"
            " choose another out folder"
        )


def asked_as_before(settings: Settings, known: dict | None = None) -> Settings:
    """The settings with the prompt by which their model was taught to speak, where they name none
    of their own: `known`, of an adapter, or the model's.
    """
    if settings.prompt != PromptSettings().filled():
        return settings
    if known is None:
        try:
            known = model_folder.open_model(settings.model.path, weights=False).origin.get("prompt")
        except UserError:
            return settings  # what loads the model says it
    before = PromptSettings(**known).filled() if known else settings.prompt
    return dataclasses.replace(settings, prompt=before) if before.task == "tts" else settings


def changes(before: dict, settings: Settings) -> dict:
    """The settings that may not change but differ from those of a run's `settings.yaml`, with
    their values of before. A setting that the file lacks is newer than the run: it had its default.

    Paths may change: fingerprints say whether model and data are the same.
    """
    old, default, free = flat(before), _defaults(settings), may_change(Settings)
    changed = {}
    for key, value in flat(_plain(dataclasses.asdict(settings))).items():
        name = ".".join(part for part in key.split(".") if not part.isdigit())
        was = old[key] if key in old else default.get(name)
        if was != value and name not in free:
            changed[key] = was
    return changed


def _defaults(settings: Settings) -> dict:
    """The default of every setting, by its full name; a prompt's depend on its task."""
    groups = {
        field.name: field.default_factory()
        for field in dataclasses.fields(Settings)
        if field.default_factory is not dataclasses.MISSING
    }
    groups["prompt"] = PromptSettings(task=settings.prompt.task).filled()
    defaults = flat({name: dataclasses.asdict(group) for name, group in groups.items()})
    return defaults | flat({"data.sources": dataclasses.asdict(SourceSettings())})


def _plain(value):
    """A tree of settings as UTF-8 can hold it: paths may have bytes that are not."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def flat(tree: dict, prefix: str = "") -> dict:
    """Full names to values; the groups of a list are numbered, and the list is its length."""
    pairs: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            pairs[prefix + key] = f"{len(value)} entries"
            pairs |= flat(dict(enumerate(value)), f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value
    return pairs
