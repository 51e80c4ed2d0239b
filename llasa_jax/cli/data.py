"""Commands that make datasets: encode, import-memmap, import-codes, import-hf-dataset."""

import argparse

from llasa_jax.cli.arguments import (
    NAME,
    UNKNOWN_CODEC,
    add_codec,
    add_command,
    add_device,
    add_max_bad_share,
    add_validation,
    load_tokenizer,
)
from llasa_jax.runtime.settings import number
from llasa_jax.runtime.storage import as_path


def encode(args) -> None:
    import functools

    from llasa_jax.encode.append import append
    from llasa_jax.encode.filters import Filters, parse_languages
    from llasa_jax.encode.offline import Job, encode_here, make_part, seal
    from llasa_jax.encode.sources import ManifestAudio

    source = functools.partial(
        ManifestAudio, args.manifest, args.validation_share, args.seed, args.columns
    )
    job = Job(
        source=source,
        out=args.out,
        codec=args.codec,
        device=args.device,
        max_bad_share=args.max_bad_share,
        batch_seconds=args.batch_seconds,
        workers=args.workers,
        max_clip_seconds=args.max_clip_seconds,
        clips_a_file=args.clips_a_file,
        filters=Filters(
            args.min_clip_seconds,
            args.max_silence,
            args.max_clipped,
            args.min_dnsmos,
            parse_languages(args.languages),
        ),
    )
    if args.shard:
        make_part(job, *args.shard)
    elif args.seal:
        seal(job)
    elif args.append:
        append(job)
    elif args.on == "ray":
        from llasa_jax.encode.on_ray import encode_on_ray

        encode_on_ray(job, args.ray_address, args.ray_cpus, args.ray_gpus, args.ray_tpus)
    elif args.devices or args.processes > 1:
        from llasa_jax.encode.processes import all_devices, encode_on

        encode_on(job, all_devices(args.device, args.processes))
    else:
        encode_here(job)


def _part(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 0/8, 1/8, ..., 7/8")
    return int(first), int(count)


def import_memmap(args) -> None:
    from llasa_jax.data.import_memmap import import_memmap

    import_memmap(
        folder=args.folder,
        out=args.out,
        tokenizer=load_tokenizer(args.tokenizer),
        codec_name=args.codec_name,
        keep_cut=args.keep_cut,
        max_bad_share=args.max_bad_share,
    )


def import_codes(args) -> None:
    from llasa_jax.data.import_codes import import_codes

    import_codes(
        folder=args.folder,
        transcripts=args.transcripts,
        columns=args.columns,
        out=args.out,
        codec_name=args.codec_name,
        code_offset=args.code_offset,
        validation_share=args.validation_share,
        seed=args.seed,
        max_bad_share=args.max_bad_share,
    )


def import_hf_dataset(args) -> None:
    from llasa_jax.encode.hf_dataset import import_hf_dataset
    from llasa_jax.encode.tables import parse_columns

    import_hf_dataset(
        source=args.source,
        out=args.out,
        columns=parse_columns(args.columns),
        codec=args.codec,
        device=args.device,
        config=args.subset,
        codec_name=args.codec_name,
        code_offset=args.code_offset,
        validation_share=args.validation_share,
        seed=args.seed,
        max_bad_share=args.max_bad_share,
        workers=args.workers,
        max_clip_seconds=args.max_clip_seconds,
    )


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "encode",
        encode,
        "Encode speech to codes: a manifest of audio and text becomes a TFDS dataset.",
    )
    parser.add_argument(
        "--manifest", type=as_path, required=True, help="a JSONL file, or lines of id|text"
    )
    _add_columns(parser, "audio=KEY,text=KEY of a JSONL file")
    parser.add_argument("--out", type=as_path, required=True, help="a new folder for the dataset")
    add_codec(parser)
    add_device(parser)
    add_validation(parser)
    add_max_bad_share(parser)
    parser.add_argument(
        "--batch-seconds",
        type=number(float, low=1, high=86_400),
        default=600.0,
        help="seconds of audio that are read ahead of the codec",
    )
    _add_reading(parser)
    _add_shards(parser)
    _add_filters(parser)

    parser = add_command(
        commands, "import-memmap", import_memmap, "Bring upstream's memmap files into our format."
    )
    parser.add_argument("folder", help="one with *_input_ids.memmap")
    _add_import_options(parser)
    parser.add_argument(
        "--tokenizer",
        default="HKUSTAudio/Llasa-1B",
        help="the tokenizer of the ids: a folder or a hub id",
    )
    parser.add_argument(
        "--keep-cut",
        action="store_true",
        help="keep rows that were cut, which teach the model never to stop",
    )

    parser = add_command(
        commands,
        "import-codes",
        import_codes,
        "Bring folders of ID.npy or ID.wav.npy codes into our format.",
    )
    parser.add_argument("folder", help="where the codes are")
    parser.add_argument(
        "transcripts", type=as_path, help="lines of id|text, or a .jsonl file with id and text"
    )
    _add_columns(parser, "id=KEY,text=KEY of a JSONL file")
    _add_import_options(parser)
    _add_code_offset(parser)
    add_validation(parser)

    parser = add_command(
        commands,
        "import-hf-dataset",
        import_hf_dataset,
        "Bring a Hugging Face dataset into our format.",
    )
    parser.add_argument("source", help="a folder or a hub id")
    _add_import_options(parser)
    _add_code_offset(parser)
    add_validation(parser)
    parser.add_argument(
        "--columns",
        required=True,
        help=(
            "codes=COLUMN or audio=COLUMN, text=COLUMN, and any of id, speaker, language,"
            " description, rate (of audio that is lists of samples); COLUMN.FIELD is a field of a"
            " column of records"
        ),
    )
    parser.add_argument(
        "--subset", type=NAME, help="the dataset's configuration, if it has several"
    )
    add_codec(parser)
    add_device(parser)
    _add_reading(parser)


def _add_columns(parser: argparse.ArgumentParser, mapping: str) -> None:
    parser.add_argument(
        "--columns",
        default="",
        help=f"what the columns of a file with | are, such as id,text,speaker; or {mapping}",
    )


def _add_import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=as_path, help="a new folder for the dataset")
    parser.add_argument(
        "--codec-name",
        type=NAME,
        default=UNKNOWN_CODEC,
        help="the codec that made the codes, to be recorded",
    )
    add_max_bad_share(parser)


def _add_code_offset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--code-offset",
        type=number(int, low=0, high=2**31 - 1),
        default=0,
        help="subtract this from every code: the id of <|s_0|>, where codes are stored as token ids"
        " (128264 for Llama 3's tokenizer)",
    )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    share = number(float, low=0, high=1)
    for name, kind, default, what in (
        ("min-clip-seconds", number(float, low=0, high=3600), 0.0, "leave shorter clips out"),
        ("max-silence", share, 1.0, "leave out clips of which a larger share is silent"),
        ("max-clipped", share, 1.0, "leave out clips with a larger share of clipped samples"),
        ("min-dnsmos", number(float, low=0, high=5), 0.0, "leave out clips of lower quality"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=what)
    parser.add_argument(
        "--languages", default="", help="such as en,de: leave out clips that name another or none"
    )


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clips-a-file",
        type=number(int, low=0, high=10_000_000),
        default=0,
        help="clips of a shard, which is one file and one task; 0 chooses",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--shard",
        type=_part,
        metavar="I/N",
        help="make every N-th shard from the I-th on, as one of N jobs; --seal follows them",
    )
    how.add_argument(
        "--seal", action="store_true", help="make the dataset of shards that are all made"
    )
    how.add_argument(
        "--append",
        action="store_true",
        help="add the clips whose ids the dataset --out does not have; the others are not encoded",
    )
    how.add_argument(
        "--devices", choices=("all",), help="use all GPUs of this machine, a process for each"
    )
    how.add_argument("--on", choices=("ray",), help="use a Ray cluster, a task for each shard")
    parser.add_argument(
        "--processes",
        type=number(int, low=1, high=256),
        default=1,
        help="for each device; on a CPU they share its cores",
    )
    parser.add_argument("--ray-address", default="auto", help="of the cluster; local starts one")
    for name, default, what in (("cpus", 1.0, "CPUs"), ("gpus", 0.0, "GPUs"), ("tpus", 0.0, "TPU")):
        parser.add_argument(
            f"--ray-{name}",
            type=number(float, low=0, high=1024),
            default=default,
            help=f"{what} that a task on Ray takes",
        )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=number(int, low=1, high=256),
        default=4,
        help="processes that read audio",
    )
    parser.add_argument(
        "--max-clip-seconds",
        type=number(float, low=1, high=3600),
        default=120.0,
        help="list longer clips as bad: the codec's memory grows with the square of their length",
    )
