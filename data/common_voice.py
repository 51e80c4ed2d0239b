"""Common Voice as a manifest: python data/common_voice.py cv-corpus/en > manifest.jsonl"""

import sys

from llasa_jax.data import corpora

if __name__ == "__main__":
    sys.exit(corpora.main(corpora.common_voice, __doc__))
