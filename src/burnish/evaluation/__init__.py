"""Evaluation: pass@k, held-out losses, comparisons, and preference pairs of sampled completions."""
