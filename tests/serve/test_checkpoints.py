"""Another checkpoint of the served run is loaded between two requests."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from served import SAMPLING, SPEECH

from llasa_jax.convert import model_folder
from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.errors import UserError
from llasa_jax.generate import steps
from llasa_jax.generate.line import Line, Speech
from llasa_jax.generate.speaker import Speaker
from llasa_jax.serve.engine import Engine, Request
from llasa_jax.serve.metrics import Metrics

pytestmark = pytest.mark.slow
LINE, LONG = Line("the quick brown fox"), replace(SPEECH, max_seconds=1.6)


@pytest.fixture
def scaled(model):
    """Of a step, weights that say something else than those of the other steps."""
    params = model[1]
    return lambda step: params | {"head": params["head"] * (1 if step == 1 else -1)}


def test_another_checkpoint_is_loaded_between_requests(new_speaker, scaled, tmp_path):
    speaker = new_speaker()
    speaker.folder, speaker._read = tmp_path, scaled
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    engine = Engine(speaker, SAMPLING, LONG, Metrics())
    first = engine.say(LINE, 7)
    compiled = steps.advance._cache_size()
    # A request that is spoken ends with the weights that it began with, and the next has others.
    given = queue.Queue()
    engine.submit(Request(LINE, 7, True, given.put))
    assert isinstance(given.get(), np.ndarray)
    loader = threading.Thread(target=engine.load, args=(2,))
    loader.start()
    while not isinstance(said := given.get(), Speech):
        assert isinstance(said, np.ndarray)
    np.testing.assert_array_equal(said.codes, first.codes)
    loader.join()
    second = engine.say(LINE, 7)
    assert second.codes.tolist() != first.codes.tolist()
    engine.load(1)
    np.testing.assert_array_equal(engine.say(LINE, 7).codes, first.codes)
    assert steps.advance._cache_size() == compiled
    for call in (engine.load, lambda step: engine.say(LINE, 7, step)):
        with pytest.raises(UserError, match="no checkpoint of step 3; there are 1, 2"):
            call(3)
    # Of two at once one is to have another checkpoint: it is spoken alone, and those before stay.
    with ThreadPoolExecutor() as pool:
        same = pool.submit(engine.say, LINE, 7)
        other = pool.submit(engine.say, LINE, 7, 2)
        after = [pool.submit(engine.say, LINE, 7) for _ in range(3)]
    for each in (same, *after):
        np.testing.assert_array_equal(each.result().codes, first.codes)
    np.testing.assert_array_equal(other.result().codes, second.codes)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine has ended"):
        engine.load(2)


@pytest.mark.soak
def test_a_checkpoint_is_what_the_run_says_there(model, scaled, tokenizer, tmp_path):
    run, codec = tmp_path / "run", make_tiny_codec(tmp_path / "codec")
    config = nnx.merge(*model).config
    model_folder.write_description(run, config, {"base_model": "tiny"})
    tokenizer.save_pretrained(run / model_folder.HF_FOLDER)
    for step in (1, 2):
        model_folder.save_params(run / "checkpoints" / str(step), scaled(step))

    def loaded(step):
        return Speaker.load(run, codec=codec, dtype="float32", step=step, rows=2)

    def codes(speaker):
        ((_, said),) = speaker.say([LINE], replace(SAMPLING, seed=7), SPEECH)
        return said.codes.tolist()

    speaker = loaded(1)
    before = codes(speaker)
    assert speaker.steps == [1, 2]
    speaker.use(speaker.weights(2))
    assert codes(speaker) == codes(loaded(2)) != before
    speaker.use(speaker.weights(1))
    assert codes(speaker) == before


def test_a_model_that_is_no_run_has_no_checkpoints(new_speaker):
    speaker = new_speaker()
    assert speaker.steps == []
    with pytest.raises(UserError, match="no checkpoint of step 1; there is none"):
        speaker.weights(1)
