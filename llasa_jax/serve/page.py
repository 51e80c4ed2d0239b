"""A page to listen (the extra `ui`): speak, clone a voice, and compare two voices blindly."""

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import gradio as gr
import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.generate.line import Line, Speech
from llasa_jax.serve import runs as runs_tab
from llasa_jax.serve import work_tab
from llasa_jax.serve.app import SpeechRequest, line_of
from llasa_jax.serve.engine import Busy, Engine, Late
from llasa_jax.serve.settings import ServeSettings
from llasa_jax.serve.voices import Unknown, Voices
from llasa_jax.serve.work import Work
from llasa_jax.speech.audio import SAMPLE_RATE, as_codec_wave

VERDICTS = ("the first", "the second", "no difference")


@dataclass
class Trial:
    """Of one listener: the two sides, which of them is played first, and how often each was better
    (the last count is of no difference).
    """

    sides: tuple[str, str] = ("", "")
    is_swapped: bool = False
    is_open: bool = False
    counts: list[int] = field(default_factory=lambda: [0, 0, 0])

    def judge(self, verdict: str) -> "Trial":
        """The trial with one more verdict, closed."""
        at = VERDICTS.index(verdict)
        side = at if at == 2 else at ^ self.is_swapped
        counts = [count + (place == side) for place, count in enumerate(self.counts)]
        return replace(self, counts=counts, is_open=False)

    def __str__(self) -> str:
        a, b = self.sides
        won_a, won_b, even = self.counts
        return f"{a}: {won_a}, {b}: {won_b}, no difference: {even}"


def new_page(
    engine: Engine,
    voices: Voices,
    settings: ServeSettings,
    runs: Path | None = None,
    work: Work | None = None,
) -> gr.Blocks:
    """The page over a running engine, with the runs below a folder, and a tab that makes datasets
    and trains; mount it with `gradio.mount_gradio_app`.
    """

    def line(model: str, voice: str, text: str) -> Line:
        body = SpeechRequest(model=model, voice=voice, input=text)
        return line_of(body, voices, engine, settings.max_text)[0]

    def say(one: Line, seed: float, step: str | None = None) -> Speech:
        try:
            return engine.say(one, int(seed), int(step) if step else None)
        except Busy:
            raise gr.Error(
                "too many requests are waiting; try again", print_exception=False
            ) from None
        except Late:
            raise gr.Error("that took too long; shorten the text", print_exception=False) from None

    def load(step):
        if not str(step).isdecimal():
            raise gr.Error("choose a step of the list", print_exception=False)
        try:
            engine.load(int(step))
        except (UserError, OSError, RuntimeError) as error:
            raise gr.Error(first_line(error), print_exception=False) from None
        return f"All that is spoken from now on is of step {step}."

    def speak(model, voice, text, seed, recording, transcript):
        try:
            one = line(model, voice, text)
            if recording is not None:
                rate, wave = recording
                if np.issubdtype(wave.dtype, np.integer):
                    wave = wave / np.iinfo(wave.dtype).max
                wave = as_codec_wave(wave.astype(np.float32), rate, "the recording")
                if len(wave) > settings.max_prompt_seconds * SAMPLE_RATE:
                    raise UserError(
                        f"the recording is longer than {settings.max_prompt_seconds:g} s"
                    )
                voice = engine.speaker.record(wave)
                one = replace(one, speaker="", prompt_audio=voice, prompt_text=transcript)
            said = say(one, seed)
        except (UserError, Unknown) as error:
            raise gr.Error(str(error), print_exception=False) from None
        return _audio(said), " ".join(map(str, said.codes))

    def compare(trial, model_a, voice_a, step_a, model_b, voice_b, step_b, text, seed):
        asked = (model_a, voice_a, step_a), (model_b, voice_b, step_b)
        a, b = (" / ".join(filter(None, side)) for side in asked)
        sides = a, b
        if sides != trial.sides:
            trial = Trial(sides)
        trial = replace(trial, is_swapped=random.random() < 0.5, is_open=True)
        try:
            both = [say(line(model, voice, text), seed, step) for model, voice, step in asked]
        except (UserError, OSError, RuntimeError, Unknown) as error:
            raise gr.Error(first_line(error), print_exception=False) from None
        first, second = both[:: -1 if trial.is_swapped else 1]
        return trial, _audio(first), _audio(second), "Which is better?"

    def judge(trial, verdict):
        if not trial.is_open:
            return trial, "Speak both first."
        before = trial
        trial = trial.judge(verdict)
        first = before.sides[before.is_swapped]
        return trial, f"The first was {first}. {trial}"

    def checkpoint(label: str) -> gr.Dropdown:
        """A choice among the run's steps, hidden where no run is served; empty, those loaded."""
        there = engine.speaker.steps
        steps = gr.Dropdown(["", *map(str, there)], value="", label=label, visible=bool(there))
        steps.focus(  # others may be there by now
            lambda: gr.Dropdown(["", *map(str, engine.speaker.steps)]),
            None,
            steps,
            api_visibility="private",
            show_progress="hidden",
        )
        return steps

    with gr.Blocks(title="llasa-jax", analytics_enabled=False) as page:
        with gr.Tab("Speak"):
            with gr.Row():
                model = gr.Dropdown(voices.models, label="Model or adapter")
                voice = gr.Dropdown(voices.names, label="Voice")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            if engine.speaker.steps:
                with gr.Row():
                    step = checkpoint("Checkpoint")
                    button, loaded = gr.Button("Load it for everybody"), gr.Markdown()
                button.click(load, step, loaded, api_visibility="private")
            text = gr.Textbox(label="Text", lines=3)
            with gr.Accordion("Clone a voice", open=False):
                recording = gr.Audio(label="Recording", type="numpy")
                transcript = gr.Textbox(label="What the recording says")
            button = gr.Button("Speak", variant="primary")
            sound, codes = (
                gr.Audio(label="Speech", buttons=["download"]),
                gr.Textbox(label="Codes", lines=3),
            )
            button.click(
                speak,
                [model, voice, text, seed, recording, transcript],
                [sound, codes],
                api_visibility="private",
            )
        with gr.Tab("Compare"):
            trial = gr.State(Trial())
            sides = []
            for side in "AB":
                with gr.Row():
                    sides += [
                        gr.Dropdown(voices.models, label=f"Model {side}"),
                        gr.Dropdown(voices.names, label=f"Voice {side}"),
                        checkpoint(f"Checkpoint {side}"),
                    ]
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            text = gr.Textbox(label="Text", lines=3)
            button = gr.Button("Speak both", variant="primary")
            with gr.Row():
                players = [
                    gr.Audio(label=label, buttons=["download"]) for label in ("First", "Second")
                ]
            result = gr.Markdown()
            button.click(
                compare,
                [trial, *sides, text, seed],
                [trial, *players, result],
                api_visibility="private",
            )
            with gr.Row():
                for verdict in VERDICTS:
                    gr.Button(verdict.capitalize()).click(
                        lambda trial, verdict=verdict: judge(trial, verdict),
                        [trial],
                        [trial, result],
                        api_visibility="private",
                    )
        if runs is not None:
            runs_tab.add_tab(runs)
        if work is not None:
            work_tab.add_tab(page, work)
    return page


def _audio(said: Speech) -> tuple[int, np.ndarray]:
    if not len(said.wave):
        raise UserError("the model ended before any speech; try another seed")
    return SAMPLE_RATE, np.round(np.clip(said.wave, -1, 1) * 32_767).astype(np.int16)
