import dataclasses
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import config_of, params_of

from llasa_jax.convert.model_folder import CHECKPOINTS, HF_FOLDER, save_params, write_description
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import make_tiny_llama
from llasa_jax.errors import UserError
from llasa_jax.generate import decode
from llasa_jax.generate import speaker as generation
from llasa_jax.generate.decode import generate_codes, plausible_limit
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.speaker import Line, generate
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.llama import Llama
from llasa_jax.model.sharding import make_mesh, parameter_shardings
from llasa_jax.speech.prompts import Prompter
from llasa_jax.speech.settings import PromptSettings

GREEDY = SamplingSettings(temperature=0)
TEXTS = [
    "the quick brown fox",
    "dog",
    "nothing else that she said was ever true, over and over and over again",
]


def graph_of(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="none"))
    )


@pytest.fixture(scope="module")
def prompts(prompter):
    return [prompter.opening(text) for text in TEXTS]


@pytest.fixture(scope="module")
def hf_models(tokenizer, tmp_path_factory):
    """Tied and untied, with weights so large that earlier tokens decide the next one."""
    import torch
    from transformers import LlamaForCausalLM

    # Others may be using the cores, and threads that wait for each other make a tiny model slow.
    threads, models = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("hf")
        make_tiny_llama(folder, tokenizer, tie_word_embeddings=tied, initializer_range=0.4)
        models[tied] = LlamaForCausalLM.from_pretrained(folder).eval()
    yield models
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ours(hf_models):
    return {
        tied: (graph_of(config_of(hf)), jax.tree.map(jnp.asarray, params_of(hf)))
        for tied, hf in hf_models.items()
    }


@pytest.fixture(scope="module")
def model(ours):
    return ours[False]


def hf_generate(hf, prompt, vocab, new, stop, speech_only=True, **settings) -> list[int]:
    import torch

    allowed = np.arange(vocab.size) >= vocab.code_base
    allowed[vocab.speech_end] = True
    if speech_only:
        settings["suppress_tokens"] = np.flatnonzero(~allowed).tolist()
    prompt = torch.tensor(prompt[None].astype(np.int64))
    with torch.inference_mode():
        tokens = hf.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=stop,
            pad_token_id=0,
            **settings,
        )
    return tokens[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("tied", "speech_only", "penalty"),
    [(True, True, 1.0), (True, False, 1.5), (False, False, 1.0), (False, True, 1.5)],
)
def test_greedy_equals_hf_token_for_token(
    hf_models, ours, prompter, prompts, tied, speech_only, penalty
):
    """A batch of prompts of three lengths; HF says each alone, without padding."""
    settings = SamplingSettings(temperature=0, speech_only=speech_only, repetition_penalty=penalty)
    results = generate_codes(*ours[tied], prompts, prompter.vocab, 30, settings)
    for prompt, result in zip(prompts, results, strict=True):
        extra = {} if penalty == 1 else {"repetition_penalty": penalty}
        assert result.tokens.tolist() == hf_generate(
            hf_models[tied],
            prompt,
            prompter.vocab,
            30,
            prompter.vocab.speech_end,
            speech_only,
            **extra,
        )
    # A model that says one thing for ever would agree with anything.
    assert len({token for result in results for token in result.tokens.tolist()}) > (
        10 if penalty == 1 else 45
    )


def test_padding_counts_as_nothing_said(model, prompter, prompts):
    """Short prompts are filled up with token 0, which no repetition penalty may touch. Here it is
    by far the best token.
    """
    graphdef, params = model
    prompt, tokens = prompts[0], jnp.asarray(prompts[0])[None]
    assert 0 not in prompt
    hidden = nnx.merge(graphdef, params)(
        tokens, jnp.arange(len(prompt))[None], jnp.ones_like(tokens)
    )[0, -1]
    eager = params | {"head": params["head"].at[0].set(100 * hidden)}
    settings = SamplingSettings(temperature=0, speech_only=False, repetition_penalty=1e6)
    (result,) = generate_codes(graphdef, eager, [prompt], prompter.vocab, 1, settings)
    assert result.tokens.tolist() == [0]


def test_rows_stop_by_themselves_where_hf_does(hf_models, model, prompter, prompts):
    free = generate_codes(*model, prompts, prompter.vocab, 30, GREEDY)
    stops = [int(free[0].tokens[11]), int(free[1].tokens[4])]
    results = generate_codes(*model, prompts, prompter.vocab, [30, 30, 7], GREEDY, stops)
    for prompt, result, limit in zip(prompts, results, (30, 30, 7), strict=True):
        assert result.tokens.tolist() == hf_generate(
            hf_models[False], prompt, prompter.vocab, limit, stops
        )
        assert result.stopped == (result.tokens[-1] in stops)
    assert [result.stopped for result in results] == [True, True, False]
    assert len(results[2].tokens) == 7


def test_a_row_does_not_depend_on_the_others(model, prompter, prompts):
    settings = SamplingSettings(temperature=3.0, top_p=0.9, repetition_penalty=1.2)
    together = generate_codes(*model, prompts, prompter.vocab, [4, 6, 8], settings)
    alone = generate_codes(*model, prompts[:1], prompter.vocab, 4, settings)
    np.testing.assert_array_equal(together[0].tokens, alone[0].tokens)
    # The place among the rows decides a row's random numbers, so the others are compared in their
    # places.
    others = generate_codes(*model, [prompts[1], *prompts[1:]], prompter.vocab, [9, 6, 8], settings)
    np.testing.assert_array_equal(together[1].tokens, others[1].tokens)
    np.testing.assert_array_equal(together[2].tokens, others[2].tokens)


def test_sampling_is_seeded(model, prompter, prompts):
    def say(seed):
        return generate_codes(
            *model, prompts[:2], prompter.vocab, 30, SamplingSettings(temperature=100.0, seed=seed)
        )

    first, again, other = say(1), say(1), say(2)
    np.testing.assert_array_equal(first[0].tokens, again[0].tokens)
    assert (first[0].tokens != other[0].tokens).mean() > 0.9
    # At this temperature all codes are about equally likely: rows, and steps of a row, must not
    # share their random numbers.
    assert (first[0].tokens != first[1].tokens).mean() > 0.9
    assert len(set(first[0].tokens.tolist())) > 27


def test_first_token_follows_hfs_distribution(hf_models, model, prompter, prompts):
    """Chi-squared over the 4 best codes, 3 degrees of freedom: a correct sampler exceeds 31 for one
    seed in a million.
    """
    import torch

    rows, vocab = 160, prompter.vocab
    settings = SamplingSettings(temperature=8.0, top_k=4, seed=3)
    results = generate_codes(*model, [prompts[1]] * rows, vocab, 1, settings)
    with torch.inference_mode():
        scores = (
            hf_models[False](torch.tensor(prompts[1][None].astype(np.int64)))
            .logits[0, -1, vocab.code_base :]
            .numpy()
            / 8
        )
    best = np.argsort(scores)[-4:]
    expected = rows * np.asarray(jax.nn.softmax(jnp.asarray(scores[best])))
    drawn = [int(result.codes[0]) for result in results]
    counts = np.array([drawn.count(code) for code in best])
    assert counts.sum() == rows
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 31


def test_one_program_serves_other_texts_limits_and_seeds(model, prompter, prompts):
    settings = SamplingSettings(temperature=0.9, seed=0)
    generate_codes(*model, prompts[:1], prompter.vocab, 120, settings)
    compiled = decode._generate._cache_size()
    generate_codes(*model, prompts[2:], prompter.vocab, 100, dataclasses.replace(settings, seed=5))
    assert len(prompts[0]) + 120 != len(prompts[2]) + 100
    assert decode._generate._cache_size() == compiled


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_sharded_weights_say_the_same(hf_models, model, prompter, prompts):
    graphdef, params = model
    sharded = jax.device_put(
        params,
        parameter_shardings(
            config_of(hf_models[False]), make_mesh(1, 1, 2, devices=jax.devices()[:2])
        ),
    )
    whole = generate_codes(graphdef, params, prompts, prompter.vocab, 20, GREEDY)
    split = generate_codes(graphdef, sharded, prompts, prompter.vocab, 20, GREEDY)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_the_models_positions_are_a_limit(hf_models, model, prompter, prompts):
    graphdef = graph_of(
        dataclasses.replace(
            config_of(hf_models[False]), max_position_embeddings=len(prompts[0]) + 5
        )
    )
    params = model[1]
    (result,) = generate_codes(graphdef, params, prompts[:1], prompter.vocab, 100, GREEDY)
    assert len(result.tokens) == 5
    assert not result.stopped
    with pytest.raises(UserError, match="prompt 1 has .* leaves no room"):
        generate_codes(graphdef, params, [prompts[0], prompts[2]], prompter.vocab, 100, GREEDY)


def test_broken_weights_and_empty_requests(model, prompter, prompts):
    graphdef, params = model
    broken = params | {"norm": params["norm"] * jnp.nan}
    with pytest.raises(UserError, match="not finite"):
        generate_codes(graphdef, broken, prompts, prompter.vocab, 5, GREEDY)
    with pytest.raises(UserError, match="max_new_tokens"):
        generate_codes(graphdef, params, prompts, prompter.vocab, 0, GREEDY)
    assert generate_codes(graphdef, params, [], prompter.vocab, 5, GREEDY) == []


def test_plausible_limit_fits_any_script():
    """About 14 English letters, 4.5 Chinese characters or 3 digits are read in a second."""
    for text, seconds in (("a" * 140, 10), ("好" * 45, 10), ("7" * 30, 10), ("Hi.", 0.4)):
        assert 1.5 * seconds < plausible_limit(text) / 50 < 6 * seconds + 4


# The whole way, from a folder to a wav.


def ending_head(graphdef, params, prompt, vocab) -> tuple[np.ndarray, int]:
    """An output table with which greedy speech of `prompt` ends by itself, and after how many
    codes.

    The end marker's row points along one of the hidden states on the way, and is just long enough
    to win there.
    """
    (said,) = generate_codes(graphdef, params, [prompt], vocab, 40, GREEDY)
    tokens = jnp.asarray(np.concatenate([prompt, said.tokens]))[None]
    net = nnx.merge(graphdef, params)
    hidden = np.asarray(net(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))[
        0, len(prompt) - 1 : -1
    ]
    best = (hidden @ np.asarray(params["head"])[vocab.code_base : vocab.code_base + 65536].T).max(
        -1
    )
    along = hidden @ hidden.T
    for at in range(5, len(hidden)):
        needed, before = best[at] / along[at, at], best[:at] / np.maximum(along[at, :at], 1e-6)
        if needed < 0.9 * before.min():
            head = np.array(params["head"])
            head[vocab.speech_end] = hidden[at] * (needed + before.min()) / 2
            return head, at
    raise AssertionError("no state stands out; take another seed")


@pytest.fixture(scope="module")
def folder(hf_models, model, tokenizer, prompter, tmp_path_factory):
    """A run, trained with other prompts than the default. Its last step ends `TEXTS[0]` by itself,
    its first hardly ever ends.
    """
    graphdef, params = model
    folder = tmp_path_factory.mktemp("run")
    settings = PromptSettings(date="", user="Say:{text}")
    head, codes = ending_head(
        graphdef, params, Prompter(tokenizer, settings).opening(TEXTS[0]), prompter.vocab
    )
    write_description(
        folder,
        config_of(hf_models[False]),
        {"base_model": "tiny", "prompt": dataclasses.asdict(settings)},
    )
    tokenizer.save_pretrained(folder / HF_FOLDER)
    save_params(folder / CHECKPOINTS / "1", params)
    save_params(folder / CHECKPOINTS / "2", params | {"head": jnp.asarray(head)})
    (folder / "ends_after").write_text(str(codes))
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return make_tiny_codec(tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    from llasa_jax.speech.audio import write_audio

    path = tmp_path_factory.mktemp("audio") / "voice.wav"
    write_audio(path, np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32))
    return path


def samples(path) -> int:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
        return file.getnframes()


def test_a_text_becomes_a_wav(folder, codec, tmp_path, capsys):
    out = tmp_path / "out.wav"
    out.write_bytes(b"an older file")
    (result,) = generate(
        folder, [Line(TEXTS[0], out)], codec=codec, sampling=GREEDY, dtype="float32"
    )
    codes = int((folder / "ends_after").read_text())
    assert result.stopped
    assert len(result.codes) == codes
    assert samples(out) == 320 * codes
    assert list(tmp_path.iterdir()) == [out]
    line = capsys.readouterr().out
    assert "stopped by itself" in line
    assert line.count("\n") == 1


def test_cloning_gives_the_new_speech_alone(folder, codec, recording, tmp_path, capsys):
    from llasa_jax.codec import load_codec

    out = tmp_path / "out.wav"
    request = {
        "codec": codec,
        "sampling": GREEDY,
        "dtype": "float32",
        "max_seconds": 0.4,
        "prompt_text": "she said",
        "speaker": "kore",
        "step": 1,
    }
    (result,) = generate(folder, [Line(TEXTS[1], out)], prompt_audio=recording, **request)
    graphdef, params, prompter, _ = generation.load(folder, "float32", step=1)
    voice = load_codec(codec)
    heard = voice.encode([np.asarray(generation.read_audio(recording))])[0]
    prompt = prompter.opening(TEXTS[1], speaker="kore", prompt_text="she said", prompt_codes=heard)
    assert prompter.settings.user == "Say:{text}"
    assert len(heard) == 51
    (expected,) = generate_codes(graphdef, params, [prompt], prompter.vocab, 20, GREEDY)
    np.testing.assert_array_equal(result.codes, expected.codes)
    assert len(set(result.codes.tolist())) > 5
    assert len(result.codes) == 20
    assert not result.stopped
    assert "limit of 20 tokens" in capsys.readouterr().out
    in_context = voice.decode(np.concatenate([heard, result.codes]))[51 * 320 :]
    np.testing.assert_allclose(
        generation.read_audio(out), np.clip(in_context, -1, 1), atol=2 / 32768
    )


def test_bfloat16_with_any_token_allowed(folder, codec, tokenizer, prompter, tmp_path, monkeypatch):
    stops = []
    monkeypatch.setattr(
        generation, "generate_codes", lambda *args: stops.extend(args[-1]) or generate_codes(*args)
    )
    sampling = SamplingSettings(speech_only=False, temperature=3.0, top_k=0)
    out = tmp_path / "out.flac"
    (result,) = generate(
        folder, [Line(TEXTS[2], out)], codec=codec, sampling=sampling, max_seconds=1
    )
    assert stops == [prompter.vocab.speech_end, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    assert len(result.codes) <= len(result.tokens) <= 50
    assert len(generation.read_audio(out)) == 320 * len(result.codes)


def test_no_speech_at_all_is_an_error_and_no_file(folder, codec, tmp_path, monkeypatch):
    silent = generation.Generated(np.empty(0, np.uint16), np.array([1], np.int32), True)
    monkeypatch.setattr(generation, "generate_codes", lambda *args: [silent])
    with pytest.raises(UserError, match="ended before any speech"):
        generate(folder, [Line("dog", tmp_path / "out.wav")], codec=codec, dtype="float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "nowhere/out.wav"}, "nowhere does not exist"),
        ({"out": "out.xyz"}, "not written as .xyz"),
        ({"out": ""}, "is a folder"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"prompt_text": "she said"}, "without prompt audio"),
        ({"prompt_audio": "voice.wav"}, "transcript"),
        ({"prompt_audio": "voice.wav", "prompt_text": " "}, "transcript"),
        ({"prompt_audio": "absent.wav", "prompt_text": "she said"}, "absent.wav: no such"),
        ({"text": " "}, "no text"),
        ({"text": "a<|eot_id|>b"}, "control token"),
        ({"model": "absent"}, "absent"),
        ({"codec": "absent/codec/folder"}, "no such codec"),
        ({"step": 7}, "no checkpoint of step 7"),
        ({"tensor": 9}, "there are 8; choose 1 to 8"),
        ({"tensor": 0}, "choose 1 to 8"),
        ({"speaker": "x" * 100_000}, "speaker has 100,000 characters"),
        ({"speaker": "ada\nben"}, "line breaks"),
        ({"speaker": "\x1b[2J"}, "control characters"),
        ({"language": " en"}, "blanks at its ends"),
    ],
)
def test_bad_requests_are_refused_and_leave_no_file(folder, codec, tmp_path, change, message):
    request = {
        "model": folder,
        "text": "dog",
        "out": "out.wav",
        "codec": codec,
        "dtype": "float32",
    } | change
    request["out"] = tmp_path / request["out"]
    with pytest.raises(UserError, match=message):
        generate(request.pop("model"), [Line(request.pop("text"), request.pop("out"))], **request)
    assert not list(tmp_path.iterdir())


def test_two_texts_need_two_files(folder, codec, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    lines = [Line("dog", tmp_path / "out.wav"), Line("cat", tmp_path / "link" / "out.wav")]
    with pytest.raises(UserError, match=r"out\.wav is given twice as the file to write"):
        generate(folder, lines, codec=codec)


def test_a_long_prompt_is_read_in_blocks(model, prompter, monkeypatch):
    """And says what it says when it is read at once; rows end in different blocks."""
    prompts = [prompter.opening("word " * count) for count in (5, 70, 150)]
    assert len(prompts[0]) < 128 < 256 < len(prompts[2])
    results = []
    for block in (128, 1024):
        monkeypatch.setattr(decode, "PROMPT_BLOCK", block)
        decode._generate.clear_cache()
        results.append(generate_codes(*model, prompts, prompter.vocab, 12, GREEDY))
    decode._generate.clear_cache()
    for in_blocks, at_once in zip(*results, strict=True):
        np.testing.assert_array_equal(in_blocks.tokens, at_once.tokens)


def test_a_codec_that_the_model_was_not_trained_with(folder, codec, tmp_path):
    """`generate` refuses it before it says anything, and takes the one that the model knows, or any
    where it knows none.
    """
    from llasa_jax.codec import load_codec
    from llasa_jax.convert.model_folder import read_description

    config, source = read_description(folder)
    run = tmp_path / "run"
    run.mkdir()
    for part in folder.iterdir():
        (run / part.name).symlink_to(part)
    (run / "model.json").unlink()
    write_description(
        run, config, {**source, "codec": {"codec": "their/codec", "fingerprint": "f00d"}}
    )
    with pytest.raises(UserError, match="codes of their/codec"):
        generate(
            run, [Line("dog", tmp_path / "x.wav")], codec=codec, dtype="float32", max_seconds=0.2
        )
    assert not (tmp_path / "x.wav").exists()
    for known in (
        {"codec": "same", "fingerprint": load_codec(codec).fingerprint},
        {"codec": "unknown", "fingerprint": "unknown"},
    ):
        write_description(run, config, {**source, "codec": known})
        generate(
            run, [Line("dog", tmp_path / "x.wav")], codec=codec, dtype="float32", max_seconds=0.2
        )
