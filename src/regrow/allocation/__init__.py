"""Decide how many units each axis keeps or gains, and which: importance scores and a budget → units kept.

``cost.Cost`` computes what a network costs at given axis sizes; ``ranked`` chooses units under a budget;
``ranked.ratios`` turns logits into pruning ratios that meet it, differentiably; ``stages`` splits a search into stages
that fit a memory budget; ``gates`` and ``commits`` choose what a search removes.
"""
