"""Architecture search: one file per paper, and the parts that they share."""
