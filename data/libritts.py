"""LibriTTS as a manifest: python data/libritts.py LibriTTS > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.libritts, __doc__))
