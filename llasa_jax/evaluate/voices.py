"""How like a voice is to another, and how good it sounds by models of listeners' opinions."""

from collections.abc import Callable, Sequence

import numpy as np

from llasa_jax.errors import UserError, first_line
from llasa_jax.evaluate.known import needed
from llasa_jax.speech.audio import SAMPLE_RATE

SHORTEST = SAMPLE_RATE // 10  # samples: less has no voice to compare, nor a quality
XVECTOR = "microsoft/wavlm-base-plus-sv"
UTMOS = "tarepan/SpeechMOS:v1.2.0"

Numbers = dict[str, np.ndarray]


class Similarity:
    """Cosine similarity of a voice to that of the reference, from -1 to 1; NaN without a reference
    or without speech.

    `embed` gives float (dimensions,) for a wave of at least `SHORTEST` samples, or None.
    """

    higher_is_better = {"similarity": True}

    def __init__(self, embed: Callable[[np.ndarray], np.ndarray | None]):
        self._embed = embed

    def __call__(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str],
        references: Sequence[np.ndarray | None],
    ) -> Numbers:
        cosines = np.full(len(waves), np.nan)
        known: dict[int, np.ndarray | None] = {}  # many clips may share a reference
        for at, (wave, reference) in enumerate(zip(waves, references, strict=True)):
            if reference is None:
                continue
            if id(reference) not in known:
                known[id(reference)] = self._voice(reference)
            one, other = self._voice(wave), known[id(reference)]
            if one is not None and other is not None:
                cosines[at] = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        return {"similarity": cosines}

    def _voice(self, wave: np.ndarray) -> np.ndarray | None:
        return self._embed(wave) if len(wave) >= SHORTEST and wave.any() else None


def resemblyzer(device: str = "cpu") -> Similarity:
    """Resemblyzer's speaker encoder (GE2E), whose weights are in its package."""
    package = needed("resemblyzer")
    encoder = package.VoiceEncoder(device, verbose=False)

    def embed(wave: np.ndarray) -> np.ndarray | None:
        voiced = package.preprocess_wav(np.clip(wave, -1, 1), SAMPLE_RATE)
        return encoder.embed_utterance(voiced) if len(voiced) >= SHORTEST else None

    return Similarity(embed)


def xvector(name: str = XVECTOR, device: str = "cpu") -> Similarity:
    """A speaker verifier of transformers with x-vectors, such as WavLM's or UniSpeech-SAT's, by its
    hub id or folder.
    """
    import torch
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    try:
        extractor = AutoFeatureExtractor.from_pretrained(name)
        model = AutoModelForAudioXVector.from_pretrained(name).to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"the speaker verifier {name} cannot be loaded on {device} ({first_line(error)}); give"
            " the hub id or the folder of a model with x-vectors, and a device that is there"
        ) from error

    @torch.inference_mode()
    def embed(wave: np.ndarray) -> np.ndarray:
        # One by one: a padded batch changes the embeddings of models without an attention mask.
        inputs = extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(device)
        return model(**inputs).embeddings[0].float().cpu().numpy()

    return Similarity(embed)


class Quality:
    """Numbers of single waves, by `score`; NaN for waves too short to have any."""

    def __init__(
        self, score: Callable[[np.ndarray], dict[str, float]], higher_is_better: dict[str, bool]
    ):
        self._score, self.higher_is_better = score, higher_is_better

    def __call__(
        self,
        waves: Sequence[np.ndarray],
        texts: Sequence[str] = (),
        references: Sequence[np.ndarray | None] = (),
    ) -> Numbers:
        none = dict.fromkeys(self.higher_is_better, float("nan"))
        rows = [self._score(wave) if len(wave) >= SHORTEST else none for wave in waves]
        return {name: np.array([row[name] for row in rows], np.float64) for name in none}


def dnsmos(device: str = "cpu") -> Quality:
    """DNSMOS P.835 and P.808 (Microsoft, through speechmos, whose package has the models): overall,
    signal and background from 1 to 5. Always on the CPU.
    """
    run = needed("speechmos.dnsmos").run
    names = {"dnsmos": "ovrl", "dnsmos_signal": "sig", "dnsmos_background": "bak"}
    names |= {"dnsmos_p808": "p808"}

    def score(wave: np.ndarray) -> dict[str, float]:
        found = run(np.clip(wave, -1, 1), SAMPLE_RATE)
        return {name: float(found[f"{key}_mos"]) for name, key in names.items()}

    return Quality(score, dict.fromkeys(names, True))


def utmos(place: str = UTMOS, device: str = "cpu") -> Quality:
    """UTMOS22 strong, naturalness from 1 to 5, as SpeechMOS publishes it for torch.hub: a
    repository on GitHub, or a folder with a copy of it.
    """
    import torch

    try:
        source = "local" if not place.partition(":")[2] else "github"
        model = torch.hub.load(place, "utmos22_strong", source=source, trust_repo=True)
        model = model.to(device).eval()
    except Exception as error:  # noqa: BLE001  # the repository's code runs here
        raise UserError(
            f"UTMOS cannot be loaded from {place} ({first_line(error)}); check the network, or give"
            " a copy of the repository as utmos:FOLDER"
        ) from error

    @torch.inference_mode()
    def score(wave: np.ndarray) -> dict[str, float]:
        return {"utmos": float(model(torch.from_numpy(wave)[None].to(device), SAMPLE_RATE))}

    return Quality(score, {"utmos": True})
