"""How a model is watched: sites are found, calls are measured, and nothing is left behind."""
