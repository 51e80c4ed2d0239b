"""Makes the speech of this folder with espeak-ng: 40 short clips by two speakers, 16 kHz mono FLAC,
and manifest.jsonl.

Run it again only to change the corpus: `python tests/speech/make_speech.py` (needs espeak-ng on the
PATH).
"""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import soundfile
import soxr

SENTENCES = [
    "Good morning, did you sleep well?",
    "The kettle is already on.",
    "Please close the door behind you.",
    "I left my keys on the table.",
    "The train leaves at 7:45.",
    "It has been raining since Monday.",
    "Can you hear the birds outside?",
    "We need bread, milk and eggs.",
    "She sold 3 paintings last week.",
    "Turn left at the old church.",
    "What a beautiful garden!",
    "My brother plays the violin.",
    "The shop closes in ten minutes.",
    "Nobody answered the phone.",
    "He paid $20 for that hat.",
    "Put the blue cup over there.",
    "I'd rather walk home tonight.",
    "Their dog is afraid of thunder.",
    "Is this seat taken?",
    "Thank you, that was delicious.",
]
VOICES = {"ada": ["-v", "en-gb+f3", "-s", "205"], "ben": ["-v", "en-us", "-s", "200", "-p", "35"]}
QUIET = 0.005  # what is trimmed at both ends, of full scale


def main():
    folder = Path(__file__).parent
    lines = []
    for speaker, options in VOICES.items():
        for number, text in enumerate(SENTENCES, 1):
            spoken = subprocess.run(
                ["espeak-ng", "--stdout", "-a", "50", *options, text],
                capture_output=True,
                check=True,
            ).stdout
            wave, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
            wave = soxr.resample(wave, rate, 16000)
            loud = np.flatnonzero(np.abs(wave) > QUIET)
            wave = wave[loud[0] : loud[-1] + 1]
            name = f"{speaker}_{number:02d}"
            soundfile.write(
                folder / f"{name}.flac", wave, 16000, subtype="PCM_16", compression_level=1.0
            )
            lines.append(
                {
                    "audio": f"{name}.flac",
                    "text": text,
                    "id": name,
                    "speaker": speaker,
                    "language": "en",
                }
            )
    (folder / "manifest.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
