"""Networks larger than memory: read, run, cut and write a network one block at a time."""
