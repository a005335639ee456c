"""Training: one loop for networks that may change their shape, with learners, checkpoints and optimizers."""
