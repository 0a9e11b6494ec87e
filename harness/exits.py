"""Exit statuses of the commands that are no verdict, and those that are."""

from __future__ import annotations

USAGE_EXIT = 2
CANNOT_SAY_EXIT = 11
INTERRUPT_EXIT = 130
JUDGED = (0, 10, 11, 12, 13)
"""``critrate run`` ended with a verdict: confirmed, refuted, inconclusive, premise violated, invalid."""
