"""Names of the attributes that number the blocks of a network, or tell something for each of them."""

from collections.abc import Mapping

FIRST: Mapping[str, str] = {"layer_idx": "a cache of keys and values counts tokens by it"}
"""Attributes that number modules → why the first module of its class must not be dropped."""

DEPTHS = frozenset(("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
"""Names of configuration entries that hold how many blocks a stack has."""

PER_BLOCK = frozenset(("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers"))
"""Names of configuration entries that hold a list with one entry per block."""
