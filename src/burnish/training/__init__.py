"""What every trainer shares: steps, checkpoints, checks, metrics."""
