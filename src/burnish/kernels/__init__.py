"""Kernels for CPUs, in C++: attention of packed rows, and what decoding spends its time in."""
