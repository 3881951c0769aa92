"""Which implementations of an operator exist, and which one a call gets."""

from __future__ import annotations

BACKENDS = ("reference",)


def check_backend(backend: str | None) -> None:
    """Raise for a backend that does not exist.

    Raises:
        ValueError: names what came and what is allowed.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, allowed are None and {', '.join(map(repr, BACKENDS))}")
