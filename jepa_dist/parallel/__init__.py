"""Process groups, meshes, and the parallelism that is applied to the plain model."""
