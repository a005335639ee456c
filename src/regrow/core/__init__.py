"""Records and pure functions that everything else is made of: axes, plans, scores, sources, budgets, errors."""
