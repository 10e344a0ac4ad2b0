"""Models: loading, precision, attention by layout, the tiled head, and scoring."""

import os

# On CPU, torch keeps 1,024 compiled kernels of its products (oneDNN's cache) and 1,024 more behind them, one for every
# shape. Packed rows have new shapes in every step: the caches would come to hold 0.5 GiB that is never used again, in
# small pieces that break up the memory of activations. 128 serve one step's layers; what is set outside stays.
os.environ.setdefault("LRU_CACHE_CAPACITY", "1")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
