"""Start of a run: where it begins, and checks of this host."""
