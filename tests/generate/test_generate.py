import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import config_of
from tiny_speech import GREEDY, graph_of

from llasa_jax.errors import UserError
from llasa_jax.generate import steps
from llasa_jax.generate.decode import generate_codes, plausible_limit
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.model.sharding import make_mesh, parameter_shardings


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
    generate_codes(*model, prompts[:1], prompter.vocab, 120, settings, [])
    compiled = steps.advance._cache_size()
    settings = dataclasses.replace(settings, seed=5)
    generate_codes(*model, prompts[2:], prompter.vocab, 100, settings, [])
    assert len(prompts[0]) + 120 != len(prompts[2]) + 100
    assert steps.advance._cache_size() == compiled


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
    with pytest.raises(UserError, match="the prompt has .* leaves no room"):
        generate_codes(graphdef, params, [prompts[0], prompts[2]], prompter.vocab, 100, GREEDY)


def test_broken_weights_and_empty_requests(model, prompter, prompts):
    graphdef, params = model
    broken = params | {"norm": params["norm"] * jnp.nan}
    with pytest.raises(UserError, match="not finite"):
        generate_codes(graphdef, broken, prompts, prompter.vocab, 5, GREEDY)
    with pytest.raises(UserError, match="a limit of 0 tokens"):
        generate_codes(graphdef, params, prompts, prompter.vocab, 0, GREEDY)
    assert generate_codes(graphdef, params, [], prompter.vocab, 5, GREEDY) == []


def test_plausible_limit_fits_any_script():
    """About 14 English letters, 4.5 Chinese characters or 3 digits are read in a second."""
    for text, seconds in (("a" * 140, 10), ("好" * 45, 10), ("7" * 30, 10), ("Hi.", 0.4)):
        assert 1.5 * seconds < plausible_limit(text) / 50 < 6 * seconds + 4


def test_a_long_prompt_is_read_in_blocks(model, prompter, monkeypatch):
    """And says what it says when it is read at once; rows end in different blocks."""
    prompts = [prompter.opening("word " * count) for count in (5, 70, 150)]
    assert len(prompts[0]) < 128 < 256 < len(prompts[2])
    results = []
    for block in (128, 1024):
        monkeypatch.setattr(steps, "PROMPT_BLOCK", block)
        steps.start.clear_cache()
        results.append(generate_codes(*model, prompts, prompter.vocab, 12, GREEDY))
    steps.start.clear_cache()
    for in_blocks, at_once in zip(*results, strict=True):
        np.testing.assert_array_equal(in_blocks.tokens, at_once.tokens)
