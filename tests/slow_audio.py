"""A source of audio with faults, in a module that a reading process imports quickly."""

import os
import signal
import time

from llasa_jax.data.audio_sources import ManifestAudio


class SlowAudio(ManifestAudio):
    """Clips whose waves are late by as many seconds as `late` says, and which kill as many of their readers as `kills` says."""

    def __init__(self, manifest, late=(), kills=(), folder=None):
        super().__init__(manifest)
        self.late, self.kills, self.folder = dict(late), dict(kills), folder

    def wave(self, index):
        if index in self.kills:
            died = len(list(self.folder.glob(f"{index}.*")))
            if died < self.kills[index]:
                (self.folder / f"{index}.{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.late.get(index, 0))
        return super().wave(index)
