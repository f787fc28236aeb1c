"""Distributed training of GPT language models with a JEPA objective."""

from jepa_dist.command_line import refuse_module_without_command

__version__ = "0.1.0"

refuse_module_without_command()
