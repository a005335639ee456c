"""Export: a network handed to the tools in which people load models. One file or folder is one format."""
