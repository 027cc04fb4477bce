"""What happens at Ctrl-C, SIGTERM and, where it is not ignored, SIGHUP (a terminal that closes): training stops after
the current step (with several processes one step later). A second signal stops it at once.

The loop then saves a checkpoint and raises StopRequestedError (loop.py). cli.py turns that into exit code 75, and a
second signal into 130.

with asked_to_stop() as stop:
    while not stop():
        ...  # a step of training
    ...  # save, and raise StopRequestedError
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from vjvcr_fast.training.processes import launched

ECHO = 2.0  # seconds within which a launcher may repeat a signal


class StopRequestedError(RuntimeError):
    """Training was asked to stop (Ctrl-C, SIGTERM or SIGHUP), and did so after saving what was trained."""


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Handles Ctrl-C, SIGTERM and SIGHUP: yields a function that says whether one has come, to be asked between steps.

    A second signal raises KeyboardInterrupt at once. With several processes the first signal may reach each twice, from
    the terminal and from the launcher; within ECHO seconds that counts as one. Outside the main thread, where Python
    allows no signal handlers, the answer is always False.
    """
    received: list[float] = []

    def receive(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if received and (launched() == 1 or now > received[0] + ECHO):
            raise KeyboardInterrupt
        received.append(now)

    main = threading.current_thread() is threading.main_thread()
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        handled.append(signal.SIGHUP)
    before = {s: signal.signal(s, receive) for s in handled} if main else {}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
