"""`llasa-jax` with a quick codec that gets stuck, or kills the process: `python tests/online_run.py stuck|killed CLIPS ARGUMENTS...`."""

import os
import signal
import sys
import time


def main(what, limit, *arguments):
    from test_encode import CountingCodec

    from llasa_jax.cli import main as llasa_jax
    from llasa_jax.data import online_cache

    class Faulty(CountingCodec):
        def encode(self, waves):
            if len(self.seen) + len(waves) > int(limit):
                if what == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                print("stuck", flush=True)
                time.sleep(600)
            return super().encode(waves)

    codec = Faulty()
    online_cache.load_codec = lambda *_: codec
    try:
        return llasa_jax(list(arguments))
    finally:
        print(f"encoded {len(codec.seen)} clips", flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
