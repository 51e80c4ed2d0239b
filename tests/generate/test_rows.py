"""Rows on one cache: refilled, copied, guarded."""

import numpy as np
import pytest
from scripted_voice import scripted_model
from tiny_speech import GREEDY

from llasa_jax.generate.continuous import Piece, run_continuous
from llasa_jax.generate.decode import Request, Rows, generate_codes
from llasa_jax.generate.sampling import SamplingSettings


def one_piece(request):
    """A job of one piece, whose result is what the row says."""
    return (yield Piece(request, "", np.empty(0, np.uint16)))


@pytest.mark.parametrize("settings", [GREEDY, SamplingSettings(3.0, repetition_penalty=1.2)])
def test_refilled_rows_say_what_one_batch_says(model, prompter, prompts, settings):
    """Five requests in two rows: in whichever row and beside whatever they are spoken."""
    five, limits = [*prompts, *prompts[:2]], [9, 31, 4, 17, 12]
    expected = generate_codes(*model, five, prompter.vocab, limits, settings)
    rows = Rows(*model, prompter.vocab, 2, settings)
    requests = map(Request, five, limits, [0] * 5, range(5))
    said = dict(run_continuous(rows, ((r.number, one_piece(r)) for r in requests)))
    for number, result in enumerate(expected):
        np.testing.assert_array_equal(said[number].tokens, result.tokens)
        assert said[number].logprob == pytest.approx(result.logprob, rel=1e-4)


def test_log_probability_equals_transformers(hf_models, model, prompter, prompts):
    """Among codes and the end marker, before temperature."""
    import torch

    vocab, settings = prompter.vocab, SamplingSettings(temperature=4.0)
    (result,) = generate_codes(*model, prompts[:1], vocab, 12, settings)
    tokens = np.concatenate([prompts[0], result.tokens]).astype(np.int64)
    with torch.inference_mode():
        logits = hf_models[False](torch.tensor(tokens[None])).logits[0, len(prompts[0]) - 1 : -1]
    allowed = torch.full((vocab.size,), -torch.inf)
    allowed[vocab.code_base :] = allowed[vocab.speech_end] = 0
    chances = torch.log_softmax(logits.double() + allowed, -1).numpy()
    expected = chances[np.arange(len(result.tokens)), result.tokens].mean()
    assert result.logprob == pytest.approx(expected, rel=1e-5)


def test_rows_share_a_prompt_and_go_on_from_a_copy(model, prompter, prompts):
    """Greedy rows of one prompt agree; a copy goes on as its parent does."""
    rows = Rows(*model, prompter.vocab, 3, GREEDY)
    rows.start([0, 2], Request(prompts[0], 40))
    rows.start([1], Request(prompts[2], 40))
    rows.advance(20)
    rows.copy([1, 1, 2])
    while not rows.ended.all():
        rows.advance()
    first, other = generate_codes(*model, [prompts[0], prompts[2]], prompter.vocab, 40, GREEDY)
    assert first.tokens.tolist() != other.tokens.tolist()
    for row, expected in enumerate([other, other, first]):
        np.testing.assert_array_equal(rows.result(row).tokens, expected.tokens)


def test_rows_of_one_prompt_draw_differently(model, prompter, prompts):
    rows = Rows(*model, prompter.vocab, 3, SamplingSettings(temperature=100.0))
    rows.start([0, 1], Request(prompts[0], 20), numbers=[5, 6])
    rows.advance(10)
    rows.copy([0, 0, 0])
    rows.advance(10)
    a, b, c = (rows.result(row).tokens for row in range(3))
    np.testing.assert_array_equal(a[:10], b[:10])
    assert (a[10:] != b[10:]).all()
    assert (a[10:] != c[10:]).all()


@pytest.mark.parametrize("period", [1, 3])
def test_a_loop_is_left(prompter, period):
    """Only `period` codes can be drawn at first, by a repetition penalty that makes them alternate:
    after 10 codes of a loop the one that goes on with it is refused.
    """
    vocab = prompter.vocab
    best = {vocab.code_base + code: 1 - code / 1000 for code in range(period)}
    model = scripted_model(vocab, best | {vocab.code_base + 100: 1e-3})
    prompt = prompter.opening("dog")

    def say(loop_codes):
        rows = Rows(*model, vocab, 1, GREEDY, loop_codes=loop_codes)
        rows.start([0], Request(prompt, 60))
        rows.advance()
        return rows.result(0).codes.tolist()

    assert set(say(0)) == {0}
    guarded = say(10)
    assert guarded[:11] == [0] * 11
    repeats = [0] * 51
    for at, code in enumerate(guarded):
        for back in range(1, 51):
            is_same = at >= back and guarded[at - back] == code
            repeats[back] = repeats[back] + 1 if is_same else 0
            assert repeats[back] <= 10
    assert len(set(guarded)) > 1
