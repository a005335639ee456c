"""Networks that tracing could get wrong, and masking by hand to find out."""
