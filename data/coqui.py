"""Coqui's metadata.csv as a manifest: python data/coqui.py FOLDER > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.coqui, __doc__))
