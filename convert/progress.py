"""A progress line on stderr for a long copy, and a summary at its end."""

import resource
import sys
import time


class Progress:
    """Prints progress when called with the number of bytes done and the total."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.total = 0

    def __call__(self, done: int, total: int) -> None:
        now, self.total = time.monotonic(), total
        if now - self.last < 1 and done < total:
            return
        self.last, rate = now, done / max(now - self.start, 1e-9)
        remaining = (total - done) / rate
        end = "\n" if done >= total else ""
        print(
            f"\r{done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {remaining:.0f} s left ",
            end=end,
            file=sys.stderr,
            flush=True,
        )

    def summary(self, tensors: int, out: str) -> str:
        seconds = time.monotonic() - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
        return f"{out}: {tensors} tensors, {self.total / 1e9:.2f} GB in {seconds:.1f} s, peak memory {peak:.2f} GiB"
