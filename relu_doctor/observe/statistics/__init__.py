"""Statistics: one pass over a pre-activation, and the totals that merge."""
