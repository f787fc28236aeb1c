"""Distributed training of GPT language models with a JEPA objective."""

__version__ = "0.1.0"
