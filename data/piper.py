"""Piper's metadata.csv as a manifest: python data/piper.py FOLDER > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.piper, __doc__))
