"""Bits per byte: on a fixed set during training, and ``python -m jepa_dist.evaluate`` after it."""

from jepa_dist.evaluate.validation import Validation

__all__ = ["Validation"]
