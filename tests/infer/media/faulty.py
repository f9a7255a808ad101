"""A child process whose decoder fails as the name of a file says: `python -m tests.infer.media.faulty DESCRIPTOR`."""

import os
import signal
import socket
import sys
import time
from typing import Any

from infer.media import child


def decode(stage: Any, sample: Any, pixel_limits: Any, limits: Any) -> Any:
    name = str(sample)
    if "/abort.mp4" in name:
        os.abort()
    if "/killed.mp4" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "/hang.mp4" in name:
        time.sleep(60)
    if "/memory.mp4" in name:
        bytearray(limits.memory_bytes)
    if "/lie.mp4" in name:
        os.write(int(sys.argv[1]), b"m")  # a message without descriptors
    if "/address.mp4" in name:
        raise ValueError("at 0x7f0000000000")
    if "/secret.mp4" in name:
        raise child.InputError(os.environ.get("API_KEY", "none"))
    return child.decode(stage, sample, pixel_limits, limits)


if __name__ == "__main__":
    child.serve(socket.socket(fileno=int(sys.argv[1])), decode)
