"""The command evaluate."""

from pathlib import Path

from llasa_jax.cli.arguments import SEED, add_base, add_codec, add_command, add_device
from llasa_jax.cli.speak import LINE
from llasa_jax.runtime.settings import number, text
from llasa_jax.runtime.storage import as_path

# Owned by llasa_jax.evaluate.scorers; importing it would slow `--help` down.
SCORERS = ("whisper", "wavlm", "dnsmos", "levels")


def evaluate(args) -> None:
    from llasa_jax.evaluate.checkpoints import evaluate
    from llasa_jax.evaluate.evaluation import PAGE, RESULTS
    from llasa_jax.generate.sampling import SamplingSettings

    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    evaluate(
        args.model,
        args.texts,
        args.out,
        steps=args.steps,
        scorers=args.scorer or SCORERS,
        scorer_device=args.scorer_device,
        scorer_processes=args.scorer_processes,
        language=args.language,
        speaker=args.speaker,
        most=args.sample,
        codec=args.codec,
        device=args.device,
        sampling=sampling,
        dtype=args.dtype,
        rows=args.rows,
        base=args.base,
    )
    print(args.out / RESULTS)
    print(args.out / PAGE)


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "Speak a list of texts with a model or a run's checkpoints, score what they say, and write"
        " a page to read and to listen. The same command goes on where it was ended.",
    )
    add_texts(parser)
    parser.add_argument("--out", type=Path, required=True, help="the evaluation's folder")
    parser.add_argument(
        "--steps",
        default="",
        help="which of a run's checkpoints: all, or steps such as 100,200; the latest if not given",
    )
    add_scorers(parser)
    add_codec(parser)
    add_device(parser)
    parser.add_argument("--temperature", type=number(float, low=0, high=1e3), default=0.8)
    parser.add_argument("--top-p", type=number(float, above=0, high=1), default=1.0)
    parser.add_argument("--repetition-penalty", type=number(float, above=0, high=100), default=1.0)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--rows", type=number(int, low=1, high=1024), default=8, help="texts spoken at once"
    )
    add_base(parser)


def add_texts(parser) -> None:
    """The model, and the texts that it speaks."""
    parser.add_argument(
        "model",
        type=as_path,
        help="a model's or a run's folder, a Hugging Face checkpoint's, or its hub id",
    )
    parser.add_argument(
        "--texts",
        type=text("a list of texts"),
        required=True,
        help="a .txt file with a text per line, a .jsonl file, a .lst file as Seed-TTS-eval's, or"
        " DATASET:SPLIT",
    )


def add_scorers(parser) -> None:
    """What measures the speech, and what it should know of the texts."""
    parser.add_argument(
        "--scorer",
        action="append",
        help="what measures; may be given several times: pocketsphinx, whisper, paraformer,"
        " resemblyzer, wavlm, dnsmos, utmos, levels, pocketsphinx:FILE with a JSGF grammar, or"
        f" asr:ID or speaker:ID with a hub id or folder; if none is given, {', '.join(SCORERS)}",
    )
    parser.add_argument(
        "--scorer-device", default="cpu", help="what runs the scorers: a device of PyTorch's"
    )
    parser.add_argument(
        "--scorer-processes",
        type=number(int, low=1, high=1024),
        default=1,
        help="processes of the scorers, each with a copy of them all",
    )
    parser.add_argument(
        "--language",
        type=LINE,
        default="",
        help="of the texts, such as en or zh; by default that of the records",
    )
    parser.add_argument(
        "--speaker", type=LINE, default="", help="who speaks the texts that name nobody"
    )
    parser.add_argument(
        "--sample",
        type=number(int, low=0, high=1_000_000_000),
        default=0,
        help="speak the first so many texts; 0 is all",
    )
