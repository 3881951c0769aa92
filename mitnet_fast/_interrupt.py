"""Ctrl-C ends a command without a traceback, whenever it comes.

While modules are imported nothing is half-done, and an exception anywhere inside them may turn into another one, or
into none: the process ends at once. From :func:`interruptible` on it is an exception, so that nothing stays
half-written.
"""

from __future__ import annotations

import os
import signal
import sys

STOPPED = 130
"""Exit code of a command that was stopped, as shells have it."""


def leave(*_: object) -> None:
    """End the process as it stands."""
    os.write(sys.__stderr__.fileno(), b"stopped\n")
    os._exit(STOPPED)


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, where it ended the process."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = _come_again


def _come_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Repeat an interrupt that ended in a finaliser, where Python reports and forgets it, once that is over."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    import threading  # not from the start, when every import is time in which Ctrl-C may come

    again = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    again.daemon = True
    again.start()
