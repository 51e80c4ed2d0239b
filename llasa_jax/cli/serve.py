"""The command serve."""

import os
from pathlib import Path

from llasa_jax.cli.arguments import add_base, add_codec, add_command, add_device, add_step
from llasa_jax.cli.speak import LINE, SAMPLING, SPEECH, add_fields
from llasa_jax.errors import UserError
from llasa_jax.generate.settings import SamplingSettings, SpeechSettings
from llasa_jax.runtime.settings import number, text
from llasa_jax.runtime.storage import as_path
from llasa_jax.serve.settings import ServeSettings

KEY = "LLASA_JAX_API_KEY"
LIMITS = {
    "host": "address to listen at",
    "port": "port to listen at; 0 is any that is free",
    "max_text": "longest text of a request, in characters",
    "max_queue": "requests that may wait for a row",
    "max_request_seconds": "longest time of a request, from when it came",
    "max_upload_mb": "largest body of a request",
    "max_prompt_seconds": "longest recording of a voice to clone",
    "max_voices": "voices that may be uploaded",
}


def serve(args) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'serving needs {error.name}; install it with `pip install "llasa-jax[serve]"`'
        ) from None
    from llasa_jax.convert.peft_adapter import open_adapter
    from llasa_jax.generate.speaker import Speaker
    from llasa_jax.runtime.compiled import keep_programs
    from llasa_jax.serve import server
    from llasa_jax.serve.app import new_app
    from llasa_jax.serve.engine import Engine
    from llasa_jax.serve.metrics import Metrics
    from llasa_jax.serve.voices import Voices
    from llasa_jax.serve.work import Work

    if (args.runs or args.work) and not args.page:
        raise UserError("--runs and --work are of the page; add --page, or leave them out")
    work = Work(args.work, str(args.model), args.codec, args.device) if args.work else None
    runs = args.runs or (work.runs if work else None)
    settings = ServeSettings(**{name: getattr(args, name) for name in LIMITS})
    sampling = SamplingSettings(
        **{name: getattr(args, name) for name in SAMPLING if name != "seed"}
    )
    speech = SpeechSettings(**{name: getattr(args, name) for name in SPEECH if name != "loudness"})
    folders = dict(_pair(given) for given in args.adapter)
    if len(folders) < len(args.adapter):
        raise UserError("two adapters have the same name; name each NAME=DIR once")
    name = args.name or as_path(args.model).name
    voices = Voices(name, {one: place for place, one in enumerate(folders, 1)}, args.speaker)
    where = server.listen(settings)
    keep_programs("")
    adapters = [open_adapter(as_path(folder), args.model) for folder in folders.values()]
    speaker = Speaker.load(
        args.model,
        codec=args.codec,
        dtype=args.dtype,
        step=args.step,
        base=args.base,
        device=args.device,
        tensor=args.tensor,
        adapters=[None, *adapters] if adapters else [],
        rows=args.rows,
    )
    if args.voices:
        voices.read(args.voices, speaker, settings.max_prompt_seconds)
    metrics = Metrics()
    engine = Engine(
        speaker,
        sampling,
        speech,
        metrics,
        max_queue=settings.max_queue,
        max_seconds=settings.max_request_seconds,
    )
    server.warm_up(engine)
    key = os.environ.get(KEY, "")
    if not key and settings.host not in ("127.0.0.1", "::1", "localhost"):
        print(f"warning: anybody who reaches {settings.host} may speak; set {KEY} to ask for a key")
    host, port = where.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(
        f"serving {name} at http://{host}:{port}/v1, voices {', '.join(voices.names)}", flush=True
    )
    app = new_app(engine, voices, settings, metrics, key)
    if args.page:
        app = server.with_page(app, engine, voices, settings, key, runs, work)
        print(f"a page to listen at http://{host}:{port}/page", flush=True)
    server.run(app, where)
    engine.close()


def _pair(given: str) -> tuple[str, str]:
    name, is_there, folder = given.partition("=")
    if not (name and is_there and folder):
        raise UserError(f"--adapter {given!r} names no folder; give NAME=DIR")
    return name, folder


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "serve",
        serve,
        "Speak for OpenAI's clients, at /v1/audio/speech (the extra serve). With the environment's"
        f" {KEY}, requests need that key.",
    )
    parser.add_argument(
        "model",
        type=as_path,
        help="a model's or a run's folder, a Hugging Face checkpoint's, or its hub id",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="PEFT's or a LoRA run's folder, which requests name as model or as voice",
    )
    parser.add_argument(
        "--speaker",
        action="append",
        type=LINE,
        default=[],
        help="a speaker of the training data, which requests name as voice",
    )
    parser.add_argument(
        "--voices",
        type=Path,
        help="voices to clone: JSONL with name, audio (a path, relative to the file) and text, what"
        " it says",
    )
    parser.add_argument(
        "--name", type=text("a name"), help="of the model in requests; its folder's by default"
    )
    parser.add_argument(
        "--page", action="store_true", help="a page to listen and compare, at /page (the extra ui)"
    )
    parser.add_argument("--runs", type=Path, help="the page shows the runs below this folder")
    parser.add_argument(
        "--work",
        type=Path,
        help="the page makes datasets from folders below this one, and trains; whoever may open the"
        " page may start that",
    )
    add_codec(parser)
    add_device(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--tensor", type=number(int, low=1, high=1024), default=1, help="devices sharing weights"
    )
    parser.add_argument(
        "--rows", type=number(int, low=1, high=1024), default=8, help="requests spoken at once"
    )
    add_step(parser)
    add_base(parser)
    add_fields(parser, SamplingSettings, {k: v for k, v in SAMPLING.items() if k != "seed"})
    add_fields(parser, SpeechSettings, {k: v for k, v in SPEECH.items() if k != "loudness"})
    add_fields(parser, ServeSettings, LIMITS)
