"""Export: a network handed to the tools in which people load models. One file is one format; none imports another."""
