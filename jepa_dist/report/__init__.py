"""``python -m jepa_dist.report``: one page that compares runs, from their run directories."""
