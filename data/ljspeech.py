"""LJSpeech as a manifest: python data/ljspeech.py LJSpeech-1.1 > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.ljspeech, __doc__))
