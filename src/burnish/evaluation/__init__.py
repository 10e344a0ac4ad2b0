"""Evaluation: pass@k, held-out losses, comparisons, and pairs of sampled completions."""
