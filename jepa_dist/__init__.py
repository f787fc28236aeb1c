"""Distributed training of GPT language models with a JEPA objective."""

__version__ = "0.1.0"

import logging

# Without a log file, messages of ranks would go to standard error besides what is printed there.
logging.getLogger(__name__).addHandler(logging.NullHandler())
