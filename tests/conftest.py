"""Settings of the whole test session."""

import os
from pathlib import Path

import torch

# One thread for each test process: the tests' tensors are small, and threads that wait for each other
# on a busy machine take far longer than they save. Tests of parallel code set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Without a GPU, Triton kernels run in Triton's interpreter; it must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Files that take minutes in `make test-all`, the longest first: one that started last would run alone at the end.
LONGEST = (
    "ops/test_sanitized.py",
    "triton_kernels/test_compile.py",
    "test_extension.py",
    "test_export.py",
    "cuda_on_host/test_compile.py",
    "triton_kernels/test_window_attention.py",
    "triton_kernels/test_feature_mixing.py",
    "training/test_kill.py",
    "cuda_on_host/test_dynamic_filter.py",
    "triton_kernels/test_dynamic_filter.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    assert all(file.exists() for file in places)
    items.sort(key=lambda item: places.get(item.path, len(places)))
