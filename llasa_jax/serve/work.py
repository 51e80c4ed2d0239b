"""Datasets and trainings that are started from the page: commands of llasa-jax, in processes of
their own, below one folder.

    datasets/NAME   the dataset; beside it NAME.jsonl, its manifest where one was made, NAME.html,
                    the report, NAME.json, the doctor's findings, NAME.yaml, settings to train with,
                    and NAME.log
    runs/NAME       a training's folder; beside it NAME.log

Whatever else is named (folders of audio, models, recipes) lies below that folder too.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread

import yaml

from llasa_jax.convert.hf_files import CONFIG
from llasa_jax.convert.model_folder import MODEL_FILE
from llasa_jax.data import corpora
from llasa_jax.errors import UserError, printable
from llasa_jax.runtime.files import explain
from llasa_jax.runtime.writing import new_file, write_whole

MANIFESTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv")
# What a folder of audio may be laid out as; without a reader it has a manifest already.
LAYOUTS: dict[str, corpora.Reader | None] = {
    f"a manifest in it: {', '.join(MANIFESTS)}": None,
    "NAME.wav with its text in NAME.txt": corpora.beside,
    "LJSpeech": corpora.ljspeech,
    "LibriTTS": corpora.libritts,
    "VCTK": corpora.vctk,
    "Common Voice": corpora.common_voice,
    "Emilia, WebDatasets": corpora.emilia,
    "AISHELL-3": corpora.aishell3,
    "Coqui": corpora.coqui,
    "Piper": corpora.piper,
}
SERVED = "the served model"
NAME = r"\w[\w.-]{0,99}"
LOG_BYTES = 4000  # of a log's end
PROGRAM = (sys.executable, "-m", "llasa_jax.cli")


@dataclass(frozen=True)
class Command:
    """Words after `llasa-jax`. `out` is a file for what it prints, the log by default; `fine` is
    the highest exit status that is no failure.
    """

    words: Sequence[str]
    out: Path | None = None
    fine: int = 0


class Job:
    """Commands one after another, each in a process of its own that goes on when this one ends,
    until one of them fails or the job is stopped.
    """

    def __init__(self, name: str, log: Path, commands: Sequence[Command], notice: str = ""):
        self.name, self.notice, self._log, self._commands = name, notice, log, commands
        self._lock, self._is_stopped = Lock(), False
        self._process: subprocess.Popen | None = None
        self.state = "running"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._thread = Thread(target=self._run, name=f"job {name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sends SIGTERM: training saves a checkpoint first, encoding goes on from there later."""
        with self._lock:
            self._is_stopped = True
            if self._process and self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)

    def wait(self) -> str:
        """The state when all has ended: done, stopped or failed."""
        self._thread.join()
        return self.state

    def log(self) -> str:
        """The end of what the commands have said."""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - LOG_BYTES))
            lines = file.read().decode(errors="replace").rstrip().split("\n")
        # A progress bar writes its line again and again.
        return "\n".join(printable(line.rstrip("\r").rpartition("\r")[2]) for line in lines)

    def _run(self) -> None:
        try:
            for command in self._commands:
                if self._call(command) > command.fine or self._is_stopped:
                    self.state = "stopped" if self._is_stopped else "failed"
                    return
            self.state = "done"
        except OSError as error:
            self.state = f"failed ({error})"

    def _call(self, command: Command) -> int:
        environment = {k: v for k, v in os.environ.items() if k != "LLASA_JAX_API_KEY"}
        with self._log.open("ab") as log, (command.out or self._log).open("ab") as out:
            with self._lock:
                if self._is_stopped:
                    return 1
                # In a session of its own, so that Ctrl-C at the server does not reach it.
                self._process = subprocess.Popen(
                    [*PROGRAM, *command.words],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
            status = self._process.wait()
        # By a signal the status is negative.
        return status if status >= 0 else 128 - status


@dataclass(frozen=True)
class Plan:
    """What a training is started with; 0 leaves a number as the recipe or the default has it."""

    name: str
    dataset: str
    model: str = SERVED
    recipe: str = ""
    steps: int = 0
    rows: int = 0
    learning_rate: float = 0.0
    lora_rank: int = 0
    every: int = 0
    sample: str = ""


class Work:
    """What the page makes below the folder `root`, with a codec and from a model by default, both
    as the command line names them. One dataset and one training at a time.
    """

    def __init__(self, root: Path, model: str, codec: str, device: str = "cpu"):
        # A name that is no folder here is a hub's or a bucket's.
        self._model, self._codec = (
            str(Path(name).absolute()) if Path(name).is_dir() else name for name in (model, codec)
        )
        self.root, self._device = root.resolve(), device
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder; make it, or give another --work")
        self.datasets, self.runs = self.root / "datasets", self.root / "runs"
        self._lock = Lock()
        self.making: Job | None = None
        self.training: Job | None = None

    def inside(self, name: str, what: str) -> Path:
        """The path of what is called `name` below the root. UserError for a name that leads out of
        it, by a link too, or nowhere.
        """
        try:
            path = (self.root / name).resolve()
            is_there = bool(name) and path.is_relative_to(self.root) and path.exists()
        except (OSError, ValueError):  # a name that is too long, or has a NUL
            is_there = False
        if not is_there:
            raise UserError(
                f"{what} {printable(name[:100])!r} is not there; give a name below the folder that"
                " the server was started with"
            )
        return path

    def audio_folders(self) -> list[str]:
        """Folders below the root, two deep, that may have audio."""
        made = [self.datasets, self.runs]
        found = [path for depth in ("*", "*/*") for path in self.root.glob(depth) if path.is_dir()]
        return self._names(
            path for path in found if not {path, path.parent} & {*made} and path.name[0] != "."
        )

    def made_datasets(self) -> list[str]:
        """Names of the datasets that are whole."""
        files = self.datasets.glob("*.yaml")
        return sorted(path.stem for path in files if path.with_suffix("").is_dir())

    def models(self) -> list[str]:
        """The served model, then models and runs below the root, two deep."""
        files = [path for name in (MODEL_FILE, CONFIG) for path in self.root.glob(f"*/*/{name}")]
        return [SERVED, *self._names({path.parent for path in files})]

    def recipes(self) -> list[str]:
        """YAML files below the root, one deep, that are no dataset's."""
        files = [*self.root.glob("*.yaml"), *self.root.glob("*/*.yaml")]
        return self._names(path for path in files if path.parent != self.datasets)

    def _names(self, paths) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in paths)

    def make_dataset(self, name: str, folder: str, layout: str, validation: float = 0.0) -> Job:
        """Starts to encode a folder of audio, and to write the report and the doctor's findings.
        UserError where a name or the layout is wrong, or another dataset is being made.
        """
        _check_name(name, "a dataset")
        audio = self.inside(folder, "the folder")
        if layout not in LAYOUTS:
            raise UserError(f"{printable(layout[:100])!r} is no layout; choose one of the list")
        if not 0 <= validation < 1:
            raise UserError(f"the share for validation is {validation:g}; give 0 to below 1")
        out = self.datasets / name
        with self._lock:
            _check_free(self.making, "dataset")
            self.datasets.mkdir(exist_ok=True)
            manifest, notice = _manifest(audio, LAYOUTS[layout], out)
            settings: dict = {
                "out": str(self.runs / name),
                "model": {"path": self._model},
                "data": {"path": str(out)},
                "mesh": {"fsdp": -1},
            }
            if validation:
                settings["data"]["validation_split"] = "validation"
            recipe, findings = (out.with_name(f"{name}.{kind}") for kind in ("yaml", "json"))
            write_whole(recipe, yaml.safe_dump(settings, sort_keys=False))
            findings.write_bytes(b"")
            encode = ["encode", f"--manifest={manifest}", f"--out={out}"]
            encode += [f"--codec={self._codec}", f"--device={self._device}"]
            encode += [f"--validation-share={validation}"]
            report = ["report", str(out), f"--out={out}.html", f"--tokenizer={self._model}"]
            doctor = ["doctor", f"--config={recipe}", "--json"]
            commands = [Command(encode), Command(report), Command(doctor, findings, fine=1)]
            self.making = Job(name, out.with_name(f"{name}.log"), commands, notice)
            return self.making

    def findings(self, name: str) -> list[dict]:
        """What the doctor said of a dataset that was made; nothing until then."""
        try:
            return json.loads(self._made(name, "json").read_bytes())
        except ValueError:
            return []

    def report(self, name: str) -> str:
        """The report on a dataset that was made, HTML; empty until then."""
        path = self._made(name, "html")
        return path.read_text(errors="replace") if path.is_file() else ""

    def _made(self, name: str, kind: str) -> Path:
        _check_name(name, "a dataset")
        return self.datasets / f"{name}.{kind}"

    def train(self, plan: Plan) -> Job:
        """Starts a training, or goes on with that of the name. UserError where a name or a number
        is wrong, or another training runs.
        """
        _check_name(plan.name, "a run")
        if plan.dataset not in self.made_datasets():
            raise UserError(
                f"no dataset {printable(plan.dataset[:100])!r} was made here; make it first"
            )
        model = self._model
        if plan.model != SERVED:
            model = str(self.inside(plan.model, "the model"))
        dataset = self.datasets / plan.dataset
        words = ["train", f"--config={dataset}.yaml"]
        if plan.recipe:
            words.append(f"--config={self.inside(plan.recipe, 'the recipe')}")
        words += [f"--out={self.runs / plan.name}", f"--model.path={model}"]
        words += [f"--data.path={dataset}"]
        numbers = {
            "train.steps": plan.steps,
            "train.rows": plan.rows,
            "optimizer.learning_rate": plan.learning_rate,
            "lora.rank": plan.lora_rank,
            "train.save_every": plan.every,
        }
        for setting, value in numbers.items():
            if value < 0:
                raise UserError(f"{setting} is {value:g}; give a number above 0, or nothing")
            words += [f"--{setting}={value}"] if value else []
        if plan.sample.strip():
            samples = json.dumps([plan.sample.strip()])
            words += [f"--log.samples={samples}", f"--log.codec={self._codec}"]
            words += [f"--log.codec_device={self._device}"]
            words += [f"--log.samples_every={plan.every}"] if plan.every else []
        with self._lock:
            _check_free(self.training, "training")
            self.training = Job(plan.name, self.runs / f"{plan.name}.log", [Command(words)])
            return self.training


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(NAME, name):
        raise UserError(
            f"{printable(name[:100])!r} is no name of {what}; give up to 100 letters, digits, dots"
            " and dashes"
        )


def _check_free(job: Job | None, what: str) -> None:
    if job and job.state == "running":
        raise UserError(f"the {what} {job.name} is being made; stop it, or wait for its end")


def _manifest(audio: Path, read: corpora.Reader | None, out: Path) -> tuple[Path, str]:
    """The manifest of a folder, written beside the dataset where a `read`er makes it, and a remark
    on what is left out.
    """
    if read is None:
        for name in MANIFESTS:
            if (audio / name).is_file():
                return audio / name, ""
        raise UserError(f"{audio}: none of {', '.join(MANIFESTS)} is in it; choose another layout")
    path = out.with_name(f"{out.name}.jsonl")
    try:
        with new_file(path) as new, new.open("w", encoding="utf-8") as file:
            count, left_out = corpora.write(read, audio, file)
    except OSError as error:
        raise UserError(str(explain(error, audio))) from None
    if not left_out:
        return path, ""
    return path, f"{count} clips; {len(left_out)} are left out, the first because {left_out[0]}"
