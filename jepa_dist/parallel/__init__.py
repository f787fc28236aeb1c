"""Ranks, meshes, and what is applied to the plain model from outside."""
