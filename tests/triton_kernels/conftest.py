"""The Triton kernels run on the GPU where there is one, else in Triton's interpreter (see tests/conftest.py)."""

from importlib.util import find_spec

# there is no Triton for macOS and Windows
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
