"""The GPT as plain modules: written as if there were one process and no compiler."""
