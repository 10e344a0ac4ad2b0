"""Kernels for CPUs, in C++: attention of packed rows, norms, gates and AdamW in training; and decoding."""
