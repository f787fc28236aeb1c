"""What the tests' own commands report."""

from __future__ import annotations

import sys

from tests.support.commands import Command

LINES = 2000
_WRITES = f"""
import sys
for number in range({LINES}):
    print(number, flush=True)
    print("error", number, file=sys.stderr, flush=True)
"""


def test_reading_the_output_of_a_running_command_changes_nothing() -> None:
    expected = "".join(f"{number}\nerror {number}\n" for number in range(LINES))
    with Command([sys.executable, "-c", _WRITES]) as command:
        while command.process() is not None:
            assert expected.startswith(command.output())
        assert command.wait(10).output == expected
