"""Settings of the whole test session."""

import os

import torch

# One thread for each test process: the tests' tensors are small, and threads that wait for each other
# on a busy machine take far longer than they save. Tests of parallel code set their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Without a GPU, Triton kernels run in Triton's interpreter; it must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
