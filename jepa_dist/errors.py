"""The one exception that every room raises for something the *user* can mend.

The front door prints it without a traceback, one line per problem, and exits with its code
(contract C7). A message names the key or file, what was expected, and the way out.
"""


class UserError(Exception):
    """Bad configuration, data or state file: one or more one-line problems."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        problems = tuple(printable(problem) for problem in problems)
        super().__init__("\n".join(problems))
        self.problems = problems


def printable(text: str) -> str:
    """``text`` on one line, with a ``?`` for what a terminal may not be able to show: names and
    values in messages can come from any file."""
    return "".join(char if char.isprintable() else "?" for char in text)


class TrainingError(UserError):
    """The run itself cannot go on; raised on every rank alike, so that rank 0 alone tells it."""

    exit_code = 3
