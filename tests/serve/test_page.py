"""The page to listen, in headless Chromium where there is one."""

import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import uvicorn
from places import SPEECH as CORPUS
from served import LIMITS, SAMPLING, SPEECH

gradio = pytest.importorskip("gradio", reason="needs the extra ui")

from llasa_jax.convert.model_folder import saved_steps  # noqa: E402
from llasa_jax.demo.tiny import make_tiny_codec  # noqa: E402
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer  # noqa: E402
from llasa_jax.generate.line import Line  # noqa: E402
from llasa_jax.serve import server  # noqa: E402
from llasa_jax.serve.app import new_app  # noqa: E402
from llasa_jax.serve.engine import Engine  # noqa: E402
from llasa_jax.serve.metrics import Metrics  # noqa: E402
from llasa_jax.serve.page import VERDICTS, Trial  # noqa: E402
from llasa_jax.serve.runs import (  # noqa: E402
    curve_of,
    evaluations_below,
    numbers_of,
    runs_below,
    samples_of,
)
from llasa_jax.serve.voices import Voices  # noqa: E402
from llasa_jax.serve.work import Work  # noqa: E402
from llasa_jax.speech.audio import write_audio  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
CHROMIUM = shutil.which("chromium")


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_verdict_counts_for_the_side_that_was_played(is_swapped):
    trial = Trial(("soft", "loud"), is_swapped, is_open=True)
    for verdict in (VERDICTS[0], VERDICTS[0], VERDICTS[2]):
        trial = trial.judge(verdict)
    won = "soft: 0, loud: 2" if is_swapped else "soft: 2, loud: 0"
    assert str(trial) == f"{won}, no difference: 1"
    assert not trial.is_open


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of which is being written, and an evaluation."""
    for name, losses in (("old", [7.0, 6.0]), ("new", [5.0, 4.0, 3.0])):
        run = tmp_path / name
        lines = [json.dumps({"step": at, "loss": loss}) for at, loss in enumerate(losses, 1)]
        (run / "samples").mkdir(parents=True)
        (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
        for sample in ("000003_0", "000003_1", "000012_0"):
            write_audio(run / "samples" / f"{sample}.wav", np.full(1600, 0.5, np.float32))
    os.utime(tmp_path / "old" / "metrics.jsonl", (0, 0))
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "results.json").write_text("{}")
    (tmp_path / "score" / "index.html").write_text("<h1>WER 3%</h1>")
    return tmp_path


def test_runs_and_evaluations_are_found_by_name(runs):
    assert list(runs_below(runs)) == ["new", "old"]
    table = numbers_of(runs / "new")
    assert curve_of(table, "loss")["value"].tolist() == [5.0, 4.0, 3.0]
    assert not len(curve_of(table, "none"))
    assert list(evaluations_below(runs)) == ["score"]
    samples = ["000012_0.wav", "000003_1.wav", "000003_0.wav"]
    assert list(samples_of(runs / "new")) == samples
    many = pd.DataFrame({"step": range(9000), "loss": range(9000)})
    assert 1000 < len(curve_of(many, "loss")) <= 2000


@contextmanager
def opened(speaker, *below):
    """A browser's page, and the engine behind it, with folders of runs and of work."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs chromium")
    metrics, voices = Metrics(), Voices("tiny", {}, ["ada"])
    engine = Engine(speaker, SAMPLING, SPEECH, metrics)
    app = new_app(engine, voices, LIMITS, metrics)
    app = server.with_page(app, engine, voices, LIMITS, "", *below)
    where = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [where]})
    thread.start()
    while not web.started:
        time.sleep(0.01)
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(90_000)
        tab.goto(f"http://127.0.0.1:{where.getsockname()[1]}/page")
        yield tab, engine
        browser.close()
    web.should_exit = True
    thread.join()
    engine.close()


@pytest.fixture
def page(new_speaker, runs):
    speaker = new_speaker()
    speaker.folder, params = runs / "new", speaker.params
    for step in (3, 6):  # Two checkpoints, which say different things.
        (speaker.folder / "checkpoints" / str(step)).mkdir(parents=True)
    speaker._read = lambda step: params | {"head": params["head"] * (1 if step == 3 else -1)}
    with opened(speaker, runs) as page:
        yield page


def test_texts_are_spoken_and_compared_in_a_browser(page, runs):
    tab, engine = page
    expected = engine.say(Line("the quick brown fox"), 7)
    tab.get_by_label("Seed").first.fill("7")
    tab.get_by_role("textbox", name="Text").first.fill("the quick brown fox")
    tab.get_by_role("button", name="Speak", exact=True).click()
    codes = " ".join(map(str, expected.codes))
    tab.wait_for_function(
        "codes => [...document.querySelectorAll('textarea')].some(t => t.value == codes)",
        arg=codes,
    )
    tab.get_by_label("Checkpoint", exact=True).click()
    tab.get_by_role("option", name="6").click()
    tab.get_by_role("button", name="Load it for everybody").click()
    tab.get_by_text("from now on is of step 6").wait_for()
    assert engine.say(Line("the quick brown fox"), 7).codes.tolist() != expected.codes.tolist()
    tab.get_by_role("textbox", name="Text").first.fill("  ")
    tab.get_by_role("button", name="Speak", exact=True).click()
    tab.get_by_text("has no text").first.wait_for()
    tab.get_by_role("tab", name="Compare").click()
    tab.get_by_label("Checkpoint A", exact=True).click()
    tab.get_by_role("option", name="3").locator("visible=true").click()
    tab.locator("textarea:visible").first.fill("dog")
    tab.get_by_role("button", name="Speak both").click()
    tab.get_by_text("Which is better?").wait_for()
    tab.get_by_role("button", name="No difference").click()
    tab.get_by_text("tiny / default / 3: 0, tiny / default: 0, no difference: 1").wait_for()
    tab.get_by_role("tab", name="Runs").click()
    tab.get_by_text("Step 3, 3 samples.").wait_for()
    tab.get_by_text("0:00").last.wait_for()  # the newest, by itself
    write_audio(runs / "new" / "samples" / "000020_0.wav", np.full(80_000, 0.5, np.float32))
    tab.get_by_text("0:05").last.wait_for()  # another is there now
    tab.get_by_label("Sample", exact=True).click()
    tab.get_by_role("option", name="000003_0.wav").click()
    tab.get_by_text("0:05").last.wait_for(state="detached")
    tab.get_by_label("Evaluation").click()
    tab.get_by_role("option", name="score").click()
    tab.frame_locator("iframe").get_by_text("WER 3%").wait_for()
    if shown := os.environ.get("SCREENSHOTS"):
        tab.set_viewport_size({"width": 1000, "height": 1150})
        tab.screenshot(path=f"{shown}/page_runs.png")


def fill(tab, label, value):
    """Types into a field of the page, and leaves it."""
    field = tab.get_by_label(label, exact=True).locator("visible=true")
    field.fill(value)
    field.press("Tab")


def pick(tab, label, value):
    """Chooses from a list of the page."""
    field = tab.get_by_label(label, exact=True).locator("visible=true")
    field.fill("")
    field.click()
    tab.get_by_role("option", name=value, exact=True).locator("visible=true").click()


@contextmanager
def ended(work):
    """Ends what was started, whatever fails."""
    try:
        yield
    finally:
        for job in filter(None, (work.making, work.training)):
            job.stop()
            job.wait()


@pytest.mark.soak
def test_a_dataset_is_made_and_trained_on_in_a_browser(new_speaker, tmp_path, monkeypatch):
    """With the real commands, in processes of their own."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    root = tmp_path / "work"
    shutil.copytree(CORPUS, root / "voice")
    make_tiny_llama(root / "models" / "tiny", make_tiny_tokenizer())
    (root / "small.yaml").write_text(
        "model: {dtype: float32, loss_chunk: 64}\ndata: {max_length: 384, doctor: 'off'}\n"
    )
    make_tiny_codec(root / "codec")
    work = Work(root, str(root / "models" / "tiny"), str(root / "codec"))
    with opened(new_speaker(), work.runs, work) as (tab, _), ended(work):
        tab.get_by_role("tab", name="Train").click()
        fill(tab, "Folder of audio", "../voice")
        fill(tab, "Name of the dataset", "mine")
        tab.get_by_role("button", name="Make the dataset").click()
        tab.get_by_text("the folder '../voice' is not there").first.wait_for()
        pick(tab, "Folder of audio", "voice")
        tab.get_by_role("button", name="Make the dataset").click()
        tab.get_by_text("mine: done").wait_for()
        assert work.made_datasets() == ["mine"]
        tab.get_by_text("looked at").locator("visible=true").first.wait_for()  # says the doctor
        tab.get_by_role("button", name="Report").click()
        tab.frame_locator("iframe").get_by_text("Hours by speaker").first.wait_for()
        tab.get_by_role("button", name="Report").click()
        pick(tab, "Dataset", "mine")
        pick(tab, "Recipe", "small.yaml")
        fill(tab, "Name of the run", "first")
        fill(tab, "Steps", "100000")
        fill(tab, "Rows per step", "2")
        tab.get_by_role("button", name="Start or go on").click()
        numbers = work.runs / "first" / "metrics.jsonl"
        while not (numbers.is_file() and numbers.read_text().count("\n") > 20):
            assert work.training is None or work.training.state == "running", work.training.log()
            time.sleep(0.1)
        tab.get_by_text("step 20/100000").wait_for()
        if shown := os.environ.get("SCREENSHOTS"):
            tab.set_viewport_size({"width": 1100, "height": 1500})
            tab.get_by_role("heading", name="A training").click()  # closes lists
            tab.screenshot(path=f"{shown}/page_train.png", full_page=True)
        tab.get_by_role("button", name="Save and stop").click()
        tab.get_by_text("first: stopped").wait_for()
    (step,) = saved_steps(work.runs / "first")
    assert step > 20
