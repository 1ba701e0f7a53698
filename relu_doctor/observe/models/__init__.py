"""Models as they come: wrapped, scripted, exported, sharded, and how their state is kept."""
