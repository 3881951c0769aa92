"""``python -m mitnet_fast`` is ``mitnet-fast``: the start of the program, before anything is imported."""

import os
import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line; Ctrl-C while its modules are imported ends it at once, without a traceback."""
    signal.signal(signal.SIGINT, _leave)
    from .cli import main as command

    command()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
