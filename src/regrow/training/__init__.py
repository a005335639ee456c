"""Training: one loop over batches, with a network that may change its shape, and all that follows it."""
