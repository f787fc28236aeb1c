"""Cluster checks, run in about a minute: ``jepa_dist doctor``."""
