"""One process of a run: launcher, signals, output, and how it ends."""
