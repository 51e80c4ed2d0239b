"""The command prefer."""

from pathlib import Path

from llasa_jax.cli.arguments import (
    SEED,
    add_base,
    add_codec,
    add_command,
    add_device,
    add_step,
)
from llasa_jax.cli.evaluate import SCORERS, add_scorers, add_texts
from llasa_jax.runtime.settings import number


def prefer(args) -> None:
    from llasa_jax.align.prefer import prefer
    from llasa_jax.generate.sampling import SamplingSettings

    sampling = SamplingSettings(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )
    made = prefer(
        args.model,
        args.texts,
        args.out,
        samples=args.samples,
        pairs=args.pairs,
        gap=args.gap,
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
        tensor=args.tensor,
        step=args.step,
        base=args.base,
    )
    print(
        f"{args.out}: {made['pairs']:,} pairs of {made['texts_with_pairs']:,} of"
        f" {made['texts']:,} texts"
    )


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "prefer",
        prefer,
        "Speak each text several times, score and rank what is said, and write the best and the"
        " worst as pairs to train on with align.loss dpo. The same command goes on where it was"
        " ended.",
    )
    add_texts(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the dataset's folder; the samples are kept beside it, in OUT.samples",
    )
    parser.add_argument(
        "--samples",
        type=number(int, low=2, high=1024),
        default=8,
        help="speeches of each text",
    )
    parser.add_argument(
        "--pairs",
        type=number(int, low=1, high=512),
        default=1,
        help="pairs of each text, at most: the best and the worst, then the next",
    )
    parser.add_argument(
        "--gap",
        type=number(float, low=0, high=1e6),
        default=0.0,
        help="the least difference of the first score in a pair; 0 is any difference in any score",
    )
    add_scorers(parser)
    add_codec(parser)
    add_device(parser)
    parser.add_argument("--temperature", type=number(float, above=0, high=1e3), default=1.1)
    parser.add_argument("--top-p", type=number(float, above=0, high=1), default=0.9)
    parser.add_argument("--top-k", type=number(int, low=0, high=1_000_000), default=75)
    parser.add_argument("--repetition-penalty", type=number(float, above=0, high=1e6), default=1.0)
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--rows", type=number(int, low=1, high=1024), default=8, help="speeches drawn at once"
    )
    parser.add_argument(
        "--tensor",
        type=number(int, low=1, high=1024),
        default=1,
        help="devices that share the weights",
    )
    add_step(parser)
    add_base(parser)
