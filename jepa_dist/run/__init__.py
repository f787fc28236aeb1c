"""A run apart from its tensors: progress, lock of its directory, consistency of its ranks."""
