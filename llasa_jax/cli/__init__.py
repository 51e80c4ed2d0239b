"""The command line. Each command imports what it needs when it runs, so that `--help` answers at
once.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from llasa_jax import __version__
from llasa_jax.errors import UserError, first_line
from llasa_jax.runtime.leave import leave
from llasa_jax.runtime.stop_signal import CommandSignal

DEFAULT_CODEC = "HKUSTAudio/xcodec2-hf"
PREVIEW_HELP = (
    "Show what the model will see: each record's tokens, with those that carry loss in colour."
)


def _given(args, *but: str) -> dict:
    """The command's arguments, named as the parameters of the function that it calls."""
    return {
        name: value
        for name, value in vars(args).items()
        if name not in ("run", "command", "settings", *but)
    }


def _import_hf(args) -> None:
    from llasa_jax.convert.import_hf import import_hf

    import_hf(**_given(args))


def _export_hf(args) -> None:
    from llasa_jax.convert.export_hf import export_hf

    export_hf(**_given(args))


def _verify(args) -> None:
    from llasa_jax.convert.verify import verify

    verify(args.hf, args.model, step=args.step).check()


def _encode(args) -> None:
    from llasa_jax.encode.offline import encode

    encode(**_given(args))


def _import_memmap(args) -> None:
    from llasa_jax.data.import_memmap import import_memmap

    import_memmap(tokenizer=_tokenizer(args.tokenizer), **_given(args, "tokenizer"))


def _import_codes(args) -> None:
    from llasa_jax.data.import_codes import import_codes

    import_codes(**_given(args))


def _import_hf_dataset(args) -> None:
    from llasa_jax.encode.hf_dataset import import_hf_dataset, parse_columns

    import_hf_dataset(columns=parse_columns(args.columns), **_given(args, "columns"))


def _tokenizer(name: str):
    """The tokenizer of a hub id, a Hugging Face folder, or one of our models' or runs' folders."""
    from transformers import AutoTokenizer

    from llasa_jax.convert.model_folder import HF_FOLDER

    inside = Path(name) / HF_FOLDER
    try:
        return AutoTokenizer.from_pretrained(inside if inside.is_dir() else name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no tokenizer can be loaded from it ({first_line(error)}); give a folder or a"
            " hub id"
        ) from None


def _train(args) -> None:
    with CommandSignal() as stop:
        # Imported only now, for they take seconds in which a signal must end the process.
        from llasa_jax.finetune import finetune
        from llasa_jax.train.settings import parse_settings

        finetune(parse_settings(args.settings), stop)


def _plan(args) -> None:
    import dataclasses
    import json

    import jax

    if args.topology != "here":
        jax.config.update("jax_platforms", "cpu")
    from llasa_jax.plan import plan
    from llasa_jax.train.settings import parse_settings

    settings = parse_settings([f"--config={args.config}", *args.settings])
    config = plan.model_geometry(args.model, settings)
    if args.search:
        smallest = (
            plan.search_slice(settings, config, args.topology) if args.topology != "here" else None
        )
        result = plan.search_rows(settings, config, args.topology) or plan.plan(
            settings, config, args.topology, 1
        )
    else:
        smallest, result = None, plan.plan(settings, config, args.topology, args.rows_per_device)
    tokens = plan.dataset_tokens(settings, args.speech_hours)
    if tokens:
        result = plan.with_dataset(result, settings, tokens)
    if args.json:
        found = {"smallest_slice": smallest and smallest.topology} if args.search else {}
        print(json.dumps(dataclasses.asdict(result) | found, indent=2))
        return
    print(plan.describe(result, settings))
    if args.search:
        print(
            f"the most rows a device that fit: {result.rows_per_device:g}"
            if result.fits
            else "not even one row a device fits"
        )
        if args.topology != "here":
            print(
                "the smallest machine of its kind that fits one row a device:"
                f" {smallest.topology if smallest else 'none that is known'}"
            )


def _preview(args) -> None:
    parser = argparse.ArgumentParser(
        prog="llasa-jax preview",
        usage="llasa-jax preview --config FILE [--count N] [--json] [--setting.name=value ...]",
        description=PREVIEW_HELP,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="the recipe of a training run; its settings may be overridden",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=5,
        help="how many records, from the first of training (default 5)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="a line a record, with id, input_ids and labels (-100 where no loss is)",
    )
    options, overrides = parser.parse_known_args(args.settings)
    from llasa_jax.encode.mixture import open_sources
    from llasa_jax.inspect.preview import preview
    from llasa_jax.train.settings import parse_settings

    if options.count < 1:
        raise UserError(f"--count is {options.count}; give a positive number")
    settings = parse_settings([f"--config={options.config}", *overrides])
    records, _ = open_sources(settings.sources, settings.data.online)
    preview(settings, records, options.count, as_json=options.json)


def _doctor(args) -> int:
    import json
    from dataclasses import asdict

    from llasa_jax.inspect.doctor import doctor
    from llasa_jax.train.settings import parse_settings

    findings = doctor(
        parse_settings(["--config", args.config, *args.settings]),
        args.codec,
        args.device,
        args.sample,
    )
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], ensure_ascii=False, indent=2))
    else:
        print(*findings, sep="\n")
    return int(any(finding.severity == "bad" for finding in findings))


def _report(args) -> None:
    from llasa_jax.inspect.report import report
    from llasa_jax.speech.prompts import Prompter

    prompter = Prompter(_tokenizer(args.tokenizer)) if args.tokenizer else None
    print(report(args.dataset, args.out, prompter, args.max_length, args.sample))


def _generate(args) -> None:
    from llasa_jax.convert.peft_adapter import open_adapters
    from llasa_jax.generate.sampling import SamplingSettings
    from llasa_jax.generate.speaker import Line, generate

    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        speech_only=not args.any_token,
        seed=args.seed,
    )
    if len(args.out) != len(args.text):
        raise UserError(
            f"{len(args.text)} texts and {len(args.out)} files to write were given; give an --out"
            " for each --text"
        )
    adapters = open_adapters(args.adapter, args.model, len(args.text))
    generate(
        args.model,
        [Line(*line) for line in zip(args.text, args.out, adapters, strict=True)],
        codec=args.codec,
        prompt_audio=args.prompt_audio,
        prompt_text=args.prompt_text,
        speaker=args.speaker,
        description=args.description,
        language=args.language,
        sampling=sampling,
        max_seconds=args.max_seconds,
        dtype=args.dtype,
        step=args.step,
        device=args.device,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llasa-jax", description="Finetune Llasa, the LLaMA that speaks, in JAX."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    dtypes = ("float32", "bfloat16", "float16")
    sub = command(
        "import-hf", _import_hf, "Bring a Hugging Face Llama or Llasa checkpoint into our format."
    )
    sub.add_argument("source", help="a local folder or a hub id, such as HKUSTAudio/Llasa-1B")
    sub.add_argument("destination", type=Path, help="a new folder for the model")
    sub.add_argument(
        "--dtype",
        choices=dtypes,
        help="keep the weights in this type instead of the checkpoint's own",
    )
    sub.add_argument(
        "--extend-vocab",
        action="store_true",
        help="start from a text model: add the speech tokens to tokenizer and tables",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the rows that --extend-vocab adds")

    sub = command(
        "export-hf", _export_hf, "Write a model or a training run as a Hugging Face checkpoint."
    )
    sub.add_argument("source", type=Path, help="a model's or a run's folder")
    sub.add_argument("destination", type=Path, help="a new folder for the checkpoint")
    sub.add_argument(
        "--step", type=int, help="which of a run's checkpoints; the latest if not given"
    )
    sub.add_argument(
        "--dtype", choices=dtypes, help="write this type instead of that of the imported checkpoint"
    )
    sub.add_argument(
        "--lora",
        choices=("adapter", "merge"),
        help="of a LoRA run: PEFT's adapter alone, or a whole model",
    )
    sub.add_argument(
        "--max-shard-size", default="5GB", help="start a new safetensors file beyond this size"
    )
    sub.add_argument(
        "--verify", action="store_true", help="compare the logits of what was written with ours"
    )
    sub.add_argument(
        "--push-to-hub", metavar="REPO", help="upload to this repository on the hub as well"
    )

    sub = command(
        "verify",
        _verify,
        "Compare the logits of a Hugging Face checkpoint with those of one of our models.",
    )
    sub.add_argument("hf", type=Path, help="the Hugging Face checkpoint's folder")
    sub.add_argument("model", type=Path, help="a model's or a run's folder")
    sub.add_argument(
        "--step", type=int, help="which of a run's checkpoints; the latest if not given"
    )

    sub = command(
        "encode",
        _encode,
        "Encode speech to codes: a manifest of audio and text becomes a TFDS dataset.",
    )
    sub.add_argument(
        "--manifest", type=Path, required=True, help="a JSONL file, or LJSpeech's metadata.csv"
    )
    sub.add_argument("--out", type=Path, required=True, help="a new folder for the dataset")
    sub.add_argument(
        "--codec",
        default=DEFAULT_CODEC,
        help="an XCodec2 checkpoint in transformers' format: a hub id or a folder",
    )
    sub.add_argument("--device", default="cpu", help="PyTorch's name of the device that encodes")
    sub.add_argument(
        "--validation-share",
        type=float,
        default=0.0,
        help="share of the clips that becomes the split `validation`",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the choice of validation clips")
    sub.add_argument(
        "--max-bad-share",
        type=float,
        default=0.05,
        help="fail if more than this share of the clips is unreadable",
    )
    sub.add_argument(
        "--batch-seconds",
        type=float,
        default=600.0,
        help="seconds of audio between two writes to the journal",
    )
    sub.add_argument("--workers", type=int, default=4, help="threads that read audio")

    def importing(name: str, run, help: str, **source: str) -> argparse.ArgumentParser:
        sub = command(name, run, help)
        for argument, what in source.items():
            sub.add_argument(argument, help=what)
        if run is _import_codes:
            sub.add_argument(
                "transcripts", type=Path, help="lines of id|text, or a .jsonl file with id and text"
            )
        sub.add_argument("out", type=Path, help="a new folder for the dataset")
        sub.add_argument(
            "--codec-name", default="unknown", help="the codec that made the codes, to be recorded"
        )
        sub.add_argument(
            "--max-bad-share",
            type=float,
            default=0.05,
            help="fail if more than this share of the rows cannot be used",
        )
        if run is not _import_memmap:
            sub.add_argument(
                "--code-offset",
                type=int,
                default=0,
                help="subtract this from every code: 128264 for Llasa's token ids",
            )
            sub.add_argument(
                "--validation-share",
                type=float,
                default=0.0,
                help="share of the clips that becomes the split `validation`",
            )
            sub.add_argument(
                "--seed", type=int, default=0, help="of the choice of validation clips"
            )
        return sub

    sub = importing(
        "import-memmap",
        _import_memmap,
        "Bring upstream's memmap files into our format.",
        folder="one with *_input_ids.memmap",
    )
    sub.add_argument(
        "--tokenizer",
        default="HKUSTAudio/Llasa-1B",
        help="the tokenizer of the ids: a folder or a hub id",
    )
    sub.add_argument(
        "--keep-cut",
        action="store_true",
        help="keep rows that were cut, which teach the model never to stop",
    )
    importing(
        "import-codes",
        _import_codes,
        "Bring folders of ID.npy or ID.wav.npy codes into our format.",
        folder="where the codes are",
    )
    sub = importing(
        "import-hf-dataset",
        _import_hf_dataset,
        "Bring a Hugging Face dataset into our format.",
        source="a folder or a hub id",
    )
    sub.add_argument(
        "--columns",
        required=True,
        help=(
            "codes=COLUMN or audio=COLUMN, text=COLUMN, and any of id, speaker, language,"
            " description"
        ),
    )
    sub.add_argument(
        "--subset",
        dest="config",
        metavar="SUBSET",
        help="the dataset's configuration, if it has several",
    )
    sub.add_argument(
        "--codec", default=DEFAULT_CODEC, help="the codec that encodes a column of audio"
    )
    sub.add_argument("--device", default="cpu", help="PyTorch's name of the device that encodes")

    sub = command(
        "train",
        _train,
        "Finetune a model on records. `llasa-jax train --help` lists every setting.",
    )
    sub.add_argument(
        "settings", nargs=argparse.REMAINDER, help="--config FILE and any --setting.name=value"
    )

    sub = command(
        "plan",
        _plan,
        "Say whether a training step fits a machine that need not be here, and how long it takes"
        " there.",
    )
    sub.add_argument(
        "--config",
        type=Path,
        required=True,
        help="the recipe; any --setting.name=value may follow, as for train",
    )
    sub.add_argument(
        "--topology",
        default="here",
        help="such as v5e:4x4, v5p:2x2x2, h100:8, or `here` for this machine",
    )
    sub.add_argument("--model", help="1b, 3b, 8b or a model's folder, instead of model.path")
    sub.add_argument("--rows-per-device", type=int, help="instead of train.rows")
    sub.add_argument(
        "--speech-hours", type=float, help="the dataset's size, where data.path is not there yet"
    )
    sub.add_argument(
        "--search",
        action="store_true",
        help="find the most rows a device and the smallest machine of its kind",
    )
    sub.add_argument("--json", action="store_true", help="print the plan for programs")

    sub = command("preview", _preview, PREVIEW_HELP)
    sub.add_argument(
        "settings",
        nargs=argparse.REMAINDER,
        help="--config FILE, --count N, --json and any --setting.name=value",
    )

    sub = command(
        "doctor",
        _doctor,
        "Look for what would spoil a training run. Settings of `train` may follow as"
        " --setting.name=value.",
    )
    sub.add_argument("--config", required=True, help="the recipe that is to be trained")
    sub.add_argument("--codec", help="examine this codec too: a hub id or a folder")
    sub.add_argument(
        "--device", default="cpu", help="PyTorch's name of the device that runs the codec"
    )
    sub.add_argument(
        "--sample", type=int, default=200_000, help="look at no more clips of a split than this"
    )
    sub.add_argument("--json", action="store_true", help="print the findings as JSON")

    sub = command("report", _report, "Write a page of pictures about a dataset.")
    sub.add_argument("dataset", type=Path, help="a folder that `encode` or an import made")
    sub.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    sub.add_argument(
        "--tokenizer",
        help="for lengths in tokens and packing: a model's folder, a tokenizer's, or a hub id",
    )
    sub.add_argument(
        "--max-length", type=int, default=2048, help="tokens of a row, as data.max_length"
    )
    sub.add_argument(
        "--sample", type=int, default=200_000, help="look at no more clips of a split than this"
    )

    sub = command(
        "generate",
        _generate,
        "Speak a text, or several at once: give --text, --out and, if need be, --adapter for each.",
    )
    sub.add_argument("--model", type=Path, required=True, help="a model's or a run's folder")
    sub.add_argument("--text", action="append", required=True)
    sub.add_argument("--out", action="append", type=Path, required=True, help="the wav to write")
    sub.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="PEFT's or a LoRA run's folder, one for all texts or one each; '' is none",
    )
    sub.add_argument(
        "--codec",
        default=DEFAULT_CODEC,
        help="an XCodec2 checkpoint in transformers' format: a hub id or a folder",
    )
    sub.add_argument(
        "--device", default="cpu", help="PyTorch's name of the device that runs the codec"
    )
    sub.add_argument("--speaker", default="", help="a speaker of the training data")
    sub.add_argument(
        "--description",
        default="",
        help="how to speak, where the model was trained with descriptions",
    )
    sub.add_argument(
        "--language", default="", help="where the model was trained with named languages"
    )
    sub.add_argument("--prompt-audio", type=Path, help="a voice to clone; needs --prompt-text")
    sub.add_argument("--prompt-text", help="what the prompt audio says")
    sub.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token always"
    )
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--top-k", type=int, default=0, help="0 means all")
    sub.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="1.2 is usual for finetuned voices"
    )
    sub.add_argument("--any-token", action="store_true", help="let text tokens be drawn too")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--max-seconds",
        type=float,
        help="longest speech; if not given, what the text makes plausible",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    sub.add_argument(
        "--step", type=int, help="which of a run's checkpoints; the latest if not given"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 2 with one sentence on stderr for what the user
    can mend, 1 for bad findings.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # argparse would take a leading --config or --help of these commands for its own.
    with_settings = {"train": _train, "preview": _preview}.get(next(iter(arguments), ""))
    if with_settings:
        args = argparse.Namespace(run=with_settings, settings=arguments[1:])
    else:
        parser = _parser()
        args, rest = parser.parse_known_args(arguments)
        if rest and args.run not in (_plan, _doctor):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.settings = rest
    warnings.showwarning = lambda message, *_, **__: print(
        f"llasa-jax: warning: {message}", file=sys.stderr
    )
    for chatty in ("absl", "orbax", "jax", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return leave(args.run(args) or 0)
    except UserError as error:
        print(f"llasa-jax: error: {error}", file=sys.stderr)
        return leave(2)
    except KeyboardInterrupt:
        print(
            "llasa-jax: interrupted; the same command goes on where work was saved", file=sys.stderr
        )
        return leave(130)
    except SystemExit as stop:
        leave(stop.code)
        raise
