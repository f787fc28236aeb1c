"""``python -m jepa_dist.config`` prints the reference page kept in docs/configuration.md."""

from jepa_dist.config.reference import reference_page

if __name__ == "__main__":
    print(reference_page(), end="")
