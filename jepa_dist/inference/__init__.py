"""A trained model in use: ``jepa_dist.load`` and ``jepa_dist generate``, on one device."""
