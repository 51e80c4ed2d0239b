"""Codes per second in generation: llasa-jax against transformers' `generate`, and continuous
batching against static batches; and 1,000 lines through 10 `kill -9`.

    python benchmarks/generation.py [transformers continuous kills sampling] [--length 500]
        [--lines 1000]

**transformers**: the same random model on both sides (4 layers of width 512 with Llasa's vocabulary
of 193,800), float32, greedy, 500 new tokens from prompts of 60, batches of 1 and 8. llasa-jax draws
speech tokens alone, as `llasa-jax generate` does; transformers computes all scores, as upstream's
example does.

**continuous**: lines of LJSpeech's lengths (benchmarks/lengths.py) from a narrow model, same
vocabulary: `generate_codes` over as many lines as rows at a time, in the file's order, each batch
until its last line ends, against `run_continuous`, longest first, as `--lines` has it.

**kills**: `llasa-jax generate --lines` of a tiny model, killed 10 times, must speak each line once,
and none again.

**sampling**: one draw of 64 rows from 65,537 scores at temperature 1.1, top-k 75 and top-p 0.9,
and with top-p alone, against transformers' warpers and `torch.multinomial`. The scores are random,
with a standard deviation of 5; where 1,024 tokens do not have 0.9, all are sorted.

Sides are timed in turns. Seconds of CPU are printed beside those of the clock, because the machine
may be busy with other work.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from lengths import ljspeech_seconds

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))
from reference import config_of, params_of
from transformers import LlamaConfig, LlamaForCausalLM

from llasa_jax.generate.continuous import Piece, run_continuous
from llasa_jax.generate.decode import Request, Rows, generate_codes
from llasa_jax.generate.sampling import SamplingSettings, draw, process
from llasa_jax.model.llama import Llama
from llasa_jax.speech.vocab import MARKERS, SpeechVocab

VOCAB = SpeechVocab({token: 128_256 + i for i, token in enumerate(MARKERS)}, 128_264, 193_800)
PROMPT, ROWS, KILLS = 60, 32, 10
GREEDY = SamplingSettings(temperature=0)


class Clock:
    """Seconds of the clock and of CPU."""

    wall = cpu = 0.0

    @contextmanager
    def running(self):
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def make_model(layers: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB.size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500_000.0, "rope_type": "default"},
    )
    model = LlamaForCausalLM(config).eval()
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, float32: {layers}"
        f" layers of width {width}, vocabulary {VOCAB.size:,}"
    )
    return model


def in_jax(model: LlamaForCausalLM):
    config = config_of(model)
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="none"))
    )
    return graphdef, jax.tree.map(jnp.asarray, params_of(model))


def make_prompts(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.integers(0, 128_000, PROMPT).astype(np.int32) for _ in range(count)]


def against_transformers(length: int, batches: list[int]) -> None:
    hf = make_model(4, 512)
    ours = in_jax(hf)
    for batch in batches:
        prompts = make_prompts(batch, np.random.default_rng(batch))
        ids = torch.from_numpy(np.stack(prompts)).long()
        theirs, mine = Clock(), Clock()

        def say(new, ids=ids):
            with torch.inference_mode():
                hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    eos_token_id=VOCAB.speech_end,
                    pad_token_id=0,
                )

        say(4)
        generate_codes(*ours, prompts, VOCAB, length, GREEDY, [])  # compiles
        with theirs.running():
            say(length)
        with mine.running():
            generate_codes(*ours, prompts, VOCAB, length, GREEDY, [])
        codes = batch * length
        for name, clock in (("transformers", theirs), ("llasa-jax", mine)):
            print(
                f"length {length}, batch {batch}, {name + ':':14}{codes / clock.wall:8.1f} codes/s"
                f"   ({clock.wall:.1f} s, {clock.cpu:.1f} s of CPU)"
            )
        print(
            f"length {length}, batch {batch}, ratio: {theirs.wall / mine.wall:.2f}"
            f"   (of CPU: {theirs.cpu / mine.cpu:.2f})",
            flush=True,
        )


def one_piece(request: Request):
    return (yield Piece(request, "", np.empty(0, np.uint16)))


def continuous_against_static(count: int) -> None:
    model = in_jax(make_model(2, 64))
    rng = np.random.default_rng(0)
    limits = (50 * ljspeech_seconds(count, rng)).astype(int)
    prompts = make_prompts(count, rng)
    longest_first = np.argsort(-limits)
    rows = Rows(*model, VOCAB, ROWS, GREEDY, [])

    def static():
        for at in range(0, count, ROWS):
            these = slice(at, at + ROWS)
            generate_codes(*model, prompts[these], VOCAB, limits[these], GREEDY, [])

    def refilled():
        jobs = ((i, one_piece(Request(prompts[i], int(limits[i])))) for i in longest_first)
        assert sum(len(said.tokens) for _, said in run_continuous(rows, jobs)) == limits.sum()

    for limit in range(8, 1200, 200):  # compiles, for each length of the cache
        rows.start([0], Request(prompts[0], limit))
        rows.advance(1)
        rows.stop([0])
    sides = {"static batches": (static, Clock()), "continuous": (refilled, Clock())}
    for speak, clock in sides.values():
        with clock.running():
            speak()
    print(f"{count} lines of {limits.mean() / 50:.1f} s on average, {ROWS} rows")
    for name, (_, clock) in sides.items():
        print(
            f"{name + ':':16}{limits.sum() / clock.wall:8.1f} codes/s   ({clock.wall:.1f} s,"
            f" {clock.cpu:.1f} s of CPU)"
        )
    (_, slow), (_, fast) = sides.values()
    print(f"ratio: {slow.wall / fast.wall:.2f}   (of CPU: {slow.cpu / fast.cpu:.2f})", flush=True)


def killed(count: int) -> None:
    from llasa_jax.demo.tiny import make_tiny_codec
    from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_tiny_codec(work / "codec")
        make_tiny_llama(work / "model", make_tiny_tokenizer())
        lines = [{"id": f"{i:04}", "text": f"the lazy dog {i}"} for i in range(count)]
        (work / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        out = work / "out"
        command = [sys.executable, "-m", "llasa_jax.cli", "generate", "--dtype=float32"]
        command += [f"--{name}={work / name}" for name in ("model", "codec")]
        command += [f"--lines={work / 'lines.jsonl'}", f"--out={out}", "--max-seconds=0.3"]
        command += ["--rows=16", "--codes"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}
        changed: dict[str, int] = {}
        for kill in range(KILLS + 1):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            goal = len(changed) + rng.integers(40, 140)
            while kill < KILLS and len(wavs(out)) < goal and process.poll() is None:
                time.sleep(0.01)
            if kill < KILLS:
                time.sleep(rng.uniform(0, 0.05))
                process.send_signal(signal.SIGKILL)
            assert process.wait() == (-signal.SIGKILL if kill < KILLS else 0)
            now = wavs(out)
            assert all(now[name] == when for name, when in changed.items()), "a line twice"
            changed = now
            print(f"{'killed with' if kill < KILLS else 'ended with'} {len(now):,} lines spoken")
        records = [json.loads(line) for line in (out / "lines.jsonl").read_text().splitlines()]
        assert sorted(record["id"] for record in records) == [line["id"] for line in lines]
        assert sorted(changed) == [f"{line['id']}.wav" for line in lines]
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
        print(f"each of {len(lines):,} lines was spoken once, over {KILLS} kills", flush=True)


def draws() -> None:
    import transformers as tf

    rows, vocab, turns = 64, 65_537, 5
    scores = np.random.default_rng(0).normal(0, 5, (rows, vocab)).astype(np.float32)
    history = torch.zeros((rows, 1), dtype=torch.long)
    ours, theirs = jnp.asarray(scores), torch.tensor(scores)
    keys, allowed = jax.random.split(jax.random.key(0), rows), jnp.ones(vocab, bool)
    for settings in (
        SamplingSettings(temperature=1.1, top_k=75, top_p=0.9),
        SamplingSettings(temperature=1.1, top_p=0.9),
    ):

        @jax.jit
        def draw_ours(scores, keys, settings=settings):
            return draw(process(scores, None, allowed, settings), keys, settings)

        warpers = tf.LogitsProcessorList([tf.TemperatureLogitsWarper(settings.temperature)])
        if settings.top_k:
            warpers.append(tf.TopKLogitsWarper(settings.top_k))
        warpers.append(tf.TopPLogitsWarper(settings.top_p))
        draw_ours(ours, keys).block_until_ready()
        clocks: dict[str, list[Clock]] = {"llasa-jax": [], "transformers": []}
        for _ in range(turns):
            clocks["llasa-jax"].append(Clock())
            with clocks["llasa-jax"][-1].running():
                draw_ours(ours, keys).block_until_ready()
            clocks["transformers"].append(Clock())
            with clocks["transformers"][-1].running():
                torch.multinomial(warpers(history, theirs).softmax(-1), 1)
        least = {name: min(clock.wall for clock in of_side) for name, of_side in clocks.items()}
        for name, seconds in least.items():
            how = f"top-k {settings.top_k}, top-p {settings.top_p}"
            print(f"{name:14}{how}: {1000 * seconds:.1f} ms")
        print(f"{least['transformers'] / least['llasa-jax']:.2f} times as fast", flush=True)


def wavs(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*.wav")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", default=["transformers", "continuous", "kills", "sampling"]
    )
    parser.add_argument("--length", type=int, default=500, help="tokens, against transformers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lines", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    print(
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; torch"
        f" {torch.__version__}, transformers {version('transformers')}, jax {jax.__version__}"
    )
    for name in args.parts:
        print(f"\n{name}")
        if name == "transformers":
            against_transformers(args.length, args.batches)
        elif name == "continuous":
            continuous_against_static(args.lines)
        elif name == "sampling":
            draws()
        else:
            killed(args.lines)


if __name__ == "__main__":
    main()
