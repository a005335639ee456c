"""The Python interface: each command as a function of a network and data as users have them."""
