"""Commands that look before training: doctor, report, preview."""

from pathlib import Path

from llasa_jax.cli.arguments import (
    add_command,
    add_config,
    add_device,
    add_sample,
    load_tokenizer,
    settings_of,
)
from llasa_jax.runtime.settings import number, text
from llasa_jax.runtime.storage import as_path


def doctor(args) -> int:
    """Returns 1 where a finding is bad."""
    import json
    from dataclasses import asdict

    from llasa_jax.inspect.doctor import doctor
    from llasa_jax.train.run_folder import asked_as_before

    findings = doctor(
        asked_as_before(settings_of(args)),
        codec=args.codec,
        device=args.device,
        sample=args.sample,
    )
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(*findings, sep="\n")
    return int(any(finding.severity == "bad" for finding in findings))


def report(args) -> None:
    from llasa_jax.inspect.report import report
    from llasa_jax.speech.prompts import Prompter

    prompter = Prompter(load_tokenizer(args.tokenizer)) if args.tokenizer else None
    print(report(args.dataset, args.out, prompter, args.max_length, args.sample))


def preview(args) -> None:
    from llasa_jax.encode.mixture import open_sources
    from llasa_jax.inspect.preview import preview
    from llasa_jax.train.run_folder import asked_as_before

    settings = asked_as_before(settings_of(args))
    records, _ = open_sources(settings.sources, settings.data.online)
    preview(settings, records, args.count, as_json=args.json)


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "preview",
        preview,
        "Show what the model will see: each record's tokens, with those that carry loss in colour."
        " Settings of `train` may follow as --setting.name=value.",
        takes_settings=True,
    )
    add_config(parser)
    parser.add_argument(
        "--count",
        type=number(int, low=1, high=1_000_000),
        default=5,
        help="how many records, from the first of training",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one line per record, with id, input_ids and labels (-100 where there is no loss)",
    )

    parser = add_command(
        commands,
        "doctor",
        doctor,
        "Look for what would spoil a training run. Settings of `train` may follow as"
        " --setting.name=value.",
        takes_settings=True,
    )
    add_config(parser)
    parser.add_argument("--codec", help="examine this codec too: a hub id or a folder")
    add_device(parser)
    add_sample(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")

    parser = add_command(commands, "report", report, "Write a page of pictures about a dataset.")
    parser.add_argument("dataset", type=as_path, help="a folder that `encode` or an import made")
    parser.add_argument(
        "--out", type=as_path, default=Path("report.html"), help="the page to write"
    )
    parser.add_argument(
        "--tokenizer",
        type=text("a folder or a hub id"),
        help="for lengths in tokens and packing: a model's folder, a tokenizer's, or a hub id",
    )
    parser.add_argument(
        "--max-length",
        type=number(int, low=2, high=1_048_576),
        default=2048,
        help="tokens per row, as data.max_length",
    )
    add_sample(parser)
