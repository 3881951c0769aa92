"""Triton kernels and their launchers, installed as ``mitnet_fast.triton_kernels``."""
