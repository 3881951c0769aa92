"""The compiled half, ``mitnet_fast._C``, or the reason why it is not there."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401  # loads the libraries that the extension is linked with


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
    except ImportError as error:
        if "cannot import name" in str(error):
            return None, "the extension is not built (MITNET_FAST_BUILD=none, or no C++ compiler at installation)"
        return None, f"the extension is built but does not load: {error}"
    return _C, None


EXTENSION, WHY_NOT = _load()
