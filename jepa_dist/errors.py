"""The one exception that every room raises for something the *user* can mend.

The front door prints it without a traceback, one line per problem, and exits with code 2
(contract C7). A message names the key or file, what was expected, and the way out.
"""


class UserError(Exception):
    """Bad configuration, data or state file: one or more one-line problems."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
