"""Malformed inputs: what is done to options and files, and to which commands it is given."""
