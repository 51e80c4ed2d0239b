"""The command generate."""

from dataclasses import fields

from llasa_jax.cli.arguments import add_base, add_codec, add_command, add_device, add_step
from llasa_jax.errors import UserError
from llasa_jax.generate.settings import SamplingSettings, SearchSettings, SpeechSettings
from llasa_jax.runtime.settings import number, text
from llasa_jax.runtime.storage import as_path

LINE = text("one line of text", r"[^\x00-\x1f\x7f]*")
# Options that are fields of settings, with the words of --help.
SAMPLING = {
    "temperature": "0 always takes the most probable token",
    "top_p": "share of probability that is kept",
    "top_k": "0 means all",
    "repetition_penalty": "1.2 is usual for finetuned voices",
    "seed": "the same seed gives the same speech",
}
SPEECH = {
    "fastest": "how many times as fast as reading aloud speech may be; it cannot end earlier",
    "max_seconds": "longest speech of a piece of text; 0 is a length that is plausible for it",
    "loop_seconds": "how long codes may repeat what was said up to a second before; 0 is for ever",
    "piece_seconds": "texts that take longer to read are cut between sentences",
    "tail_seconds": "longest silence left at the end",
    "loudness": "in LUFS, such as -23; 0 leaves it alone (the extra loudness)",
    "normalize": "write out numbers, dates and abbreviations in this language, such as en (the"
    " extra normalize)",
}
SEARCH = {
    "rows": "texts, or samples of a search, that are spoken at once",
    "beams": "partial speeches that a beam search goes on from",
    "every": "codes between two choices of a beam search",
    "search_seconds": "longest search for each piece of text; 0 is no limit",
}


def generate(args) -> None:
    from functools import partial

    from llasa_jax.convert.peft_adapter import open_adapters
    from llasa_jax.generate import files
    from llasa_jax.generate.search import Search
    from llasa_jax.generate.speaker import Line, Speaker

    sampling = SamplingSettings(
        **{name: getattr(args, name) for name in SAMPLING}, speech_only=not args.any_token
    )
    settings = SpeechSettings(**{name: getattr(args, name) for name in SPEECH})
    search = None
    if args.search:
        found = SearchSettings.parse(args.search, **{name: getattr(args, name) for name in SEARCH})
        search = Search(found)
        search.check(sampling)
        search.outcome = _scorers(args.scorer, args.device, args.normalize)
        search.process = _scorers(args.process_scorer, args.device, args.normalize)
    elif args.scorer or args.process_scorer:
        raise UserError("scorers judge the samples of a search; give --search best-of:8 or beam")
    common = {
        "speaker": args.speaker,
        "description": args.description,
        "language": args.language,
        "prompt_audio": args.prompt_audio,
        "prompt_text": args.prompt_text or "",
    }
    if args.lines:
        if args.text or len(args.out) != 1 or len(args.adapter) > 1:
            raise UserError("with --lines, give one --out, the folder, and no --text")
        lines = files.read_lines(args.lines, common)
    else:
        if not args.text:
            raise UserError("there is nothing to say; give --text, or --lines and a file of lines")
        if len(args.out) != len(args.text):
            raise UserError(
                f"{len(args.text)} texts and {len(args.out)} files to write were given; give an"
                " --out for each --text"
            )
        files.check_outs(args.out, args.codes)
        several = len(args.adapter) > 1
        lines = [
            Line(one, **common, adapter=at if several else 0) for at, one in enumerate(args.text)
        ]
    speaker = Speaker.load(
        args.model,
        codec=args.codec,
        dtype=args.dtype,
        step=args.step,
        base=args.base,
        device=args.device,
        tensor=args.tensor,
        adapters=open_adapters(args.adapter, args.model, len(args.adapter)),
        rows=args.rows,
    )
    for line in lines:  # before anything is said, in case a text is refused
        speaker.check(line)
    say = partial(speaker.say, sampling=sampling, settings=settings, search=search)
    if args.lines:
        about = files.settings_of(
            sampling,
            settings,
            search and search.settings,
            model=files.identity(args.model, args.step),
            codec=speaker.codec.fingerprint,
            adapter=[files.identity(adapter) for adapter in args.adapter if adapter],
            scorers=[args.scorer, args.process_scorer],
            dtype=args.dtype,
        )
        files.speak_lines(say, lines, args.out[0], about, args.codes)
    else:
        files.speak_files(say, lines, args.out, args.codes)


def _scorers(names: list[str], device: str, language: str) -> list:
    if not names:
        return []
    from llasa_jax.evaluate.scorers import load_scorers

    return load_scorers(names, "cpu" if device.startswith("jax") else device, language)


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "generate",
        generate,
        "Speak a text, several (give --text and --out for each), or the lines of a file.",
    )
    parser.add_argument(
        "--model",
        type=as_path,
        required=True,
        help="a model's or a run's folder, a Hugging Face checkpoint's, or its hub id",
    )
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument(
        "--lines",
        type=as_path,
        help="JSONL with text and optionally id, speaker, description, language, prompt_audio and"
        " prompt_text; the same command goes on after a crash",
    )
    parser.add_argument(
        "--out",
        action="append",
        type=as_path,
        required=True,
        help="the wav to write, or the folder for --lines",
    )
    parser.add_argument("--codes", action="store_true", help="write the codes too, as .npy")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="PEFT's or a LoRA run's folder, one for all texts or one each; '' is none",
    )
    add_codec(parser)
    add_device(parser)
    parser.add_argument("--speaker", type=LINE, default="", help="a speaker of the training data")
    parser.add_argument(
        "--description",
        type=LINE,
        default="",
        help="how to speak, where the model was trained with descriptions",
    )
    parser.add_argument(
        "--language", type=LINE, default="", help="where the model was trained with named languages"
    )
    parser.add_argument(
        "--prompt-audio", type=as_path, help="a voice to clone; needs --prompt-text"
    )
    parser.add_argument("--prompt-text", help="what the prompt audio says")
    add_fields(parser, SamplingSettings, SAMPLING)
    parser.add_argument("--any-token", action="store_true", help="allow text tokens too")
    add_fields(parser, SpeechSettings, SPEECH)
    _add_search(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--tensor",
        type=number(int, low=1, high=1024),
        default=1,
        help="devices that share the weights, for models larger than one device's memory",
    )
    add_step(parser)
    add_base(parser)


def _add_search(parser) -> None:
    parser.add_argument(
        "--search",
        metavar="KIND",
        help="best-of:8, or beam:8: draw several speeches, keep the best",
    )
    parser.add_argument(
        "--scorer",
        action="append",
        default=[],
        help="a scorer of `evaluate` that judges finished speech in a search; the first decides,"
        " the next where it finds no difference",
    )
    parser.add_argument(
        "--process-scorer",
        action="append",
        default=[],
        help="judges speech while it grows, in a beam search",
    )
    add_fields(parser, SearchSettings, SEARCH)


def add_fields(parser, settings: type, words: dict[str, str]) -> None:
    """An option for each of these fields of a settings' dataclass, with its default and range."""
    of = {field.name: field for field in fields(settings)}
    for name, help in words.items():
        allowed, default = of[name].metadata["allowed"], of[name].default
        kind = (
            text(allowed.words, allowed.pattern)
            if isinstance(default, str)
            else number(float if isinstance(default, float) else int, **vars(allowed))
        )
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=help)
