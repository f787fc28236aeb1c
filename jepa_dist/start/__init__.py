"""How a run starts: where it begins, and whether this host can train it."""
