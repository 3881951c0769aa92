"""``python -m mitnet_fast`` is ``mitnet-fast``: the start of the program, before anything is imported."""

import signal

from ._interrupt import leave


def main() -> None:
    """Run the command line; Ctrl-C while its modules are imported ends it at once, without a traceback."""
    signal.signal(signal.SIGINT, leave)
    from .cli import main as command

    command()


if __name__ == "__main__":
    main()
