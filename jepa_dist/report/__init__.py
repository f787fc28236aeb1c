"""``python -m jepa_dist.report``: runs compared on one page, from what is in their directories."""
