"""What tests share: fakes, inputs, and ways to run the program. No test imports another test."""

from __future__ import annotations

import pytest

# Their assertions are those of tests: pytest prints the compared values.
pytest.register_assert_rewrite(
    "tests.support.gradients", "tests.support.prepared", "tests.support.runs"
)
