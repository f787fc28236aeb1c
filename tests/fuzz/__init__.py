"""Property-based fuzzing of what reads checkpoints and run directories."""
