"""Pure functions of tensors: per-token losses and the one aggregator."""
