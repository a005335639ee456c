"""Export networks to the file formats of other tools, and check each file by reading it back."""
