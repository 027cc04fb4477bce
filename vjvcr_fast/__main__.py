"""The entry of `vjvcr-fast` and `python -m vjvcr_fast`. It sets environment variables that OpenMP reads with torch.

While torch is imported, Ctrl-C ends the process without a word: there is nothing to save, and nothing to tell.

An OpenMP thread that waits for the others spins. If another process is busy too, it spins for whole time slices, and a
step of a small network takes several times as long. A short spin avoids most of this and costs nothing on a quiet
machine (docs/benchmarks.md). Child processes, those of torchrun too, inherit the variables or set them themselves.
"""

import os
import signal
import sys

# GNU's OpenMP counts rounds of its waiting loop, Intel's counts milliseconds.
WAIT = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's own choice stays
        for name, value in WAIT.items():
            os.environ.setdefault(name, value)
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not ignored, as under nohup
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vjvcr_fast.cli import main as run

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


if __name__ == "__main__":
    sys.exit(main())
