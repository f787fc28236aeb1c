"""What can go wrong with a cluster, found in a minute: the checks of ``jepa_dist doctor``."""
