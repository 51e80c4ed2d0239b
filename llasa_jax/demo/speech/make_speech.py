"""Makes the speech of this folder with flite's voices slt and rms (Debian's package flite): eight
short sentences, 16 kHz mono FLAC, and manifest.jsonl.

Run it again only to change the corpus: `python llasa_jax/demo/speech/make_speech.py`.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

SENTENCES = [
    "Turn the kitchen light on.",
    "The train leaves at seven.",
    "Please close the door.",
    "We need bread, milk and eggs.",
    "The shop closes at ten.",
    "Turn left at the old church.",
    "Did you sleep well?",
    "My brother plays the violin.",
]
VOICES = "slt", "rms"
QUIET = 0.005  # what is trimmed at both ends, of full scale


def main():
    folder = Path(__file__).parent
    lines = []
    for number, text in enumerate(SENTENCES, 1):
        voice = VOICES[number % 2]
        name = f"{voice}_{number}"
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", file.name], check=True)
            wave, rate = soundfile.read(file.name)
        loud = np.flatnonzero(np.abs(wave) > QUIET)
        wave = wave[loud[0] : loud[-1] + 1]
        soundfile.write(folder / f"{name}.flac", wave, rate, subtype="PCM_16")
        line = {"audio": f"{name}.flac", "text": text, "id": name, "speaker": voice}
        lines.append(line | {"language": "en"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
