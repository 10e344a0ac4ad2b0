"""Bytes, FLOPs and seconds of a run before anything is allocated, by formulas and without torch."""
