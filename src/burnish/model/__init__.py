"""Models: loading, precision, attention layouts, the tiled head, and scoring."""

import os

# oneDNN caches 1,024 compiled kernels by shape, and torch 1,024 more. Packed rows have new shapes every step, so the
# caches would fill 0.5 GiB with kernels never used again and fragment the memory of activations. 128 serve the layers
# of one step; values set in the environment win.
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
