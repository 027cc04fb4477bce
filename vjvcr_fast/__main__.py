"""The entry of `vjvcr-fast` and `python -m vjvcr_fast`: sets what OpenMP reads when torch is loaded.

A thread of OpenMP that waits for the others spins. Beside another busy process it spins for whole time slices, and a
step of a small network takes up to 45 times as long. A short spin costs nothing on a quiet machine
(benchmarks/bench_busy.py). Child processes, torchrun's too, inherit or set the same.
"""

import os
import sys

# GNU's OpenMP counts rounds of the loop it waits in, Intel's milliseconds.
WAIT = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    if "OMP_WAIT_POLICY" not in os.environ:  # the user's own choice stands, by whichever name
        for name, value in WAIT.items():
            os.environ.setdefault(name, value)
    from vjvcr_fast.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
