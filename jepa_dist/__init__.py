"""Distributed training of GPT language models with a JEPA objective."""

import logging

from jepa_dist.command_line import refuse_module_without_command

__version__ = "0.1.0"

# Without a log file, messages of ranks would go to standard error besides what is printed there.
logging.getLogger(__name__).addHandler(logging.NullHandler())
refuse_module_without_command()
