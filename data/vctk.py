"""VCTK as a manifest: python data/vctk.py VCTK-Corpus-0.92 > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.vctk, __doc__))
