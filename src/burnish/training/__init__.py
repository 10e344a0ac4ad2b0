"""Parts shared by all trainers: the learner, steps, checkpoints, checks, metrics."""
