"""Protection of earlier tasks by the curvature of their losses: what continual-learning methods share."""
