"""``python -m mitnet_fast`` is ``mitnet-fast``."""

from .cli import main

main()
