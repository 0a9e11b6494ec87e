"""Errors that whoever runs critrate can mend."""

from __future__ import annotations


class Mendable(Exception):
    """Its text is shown alone, without a traceback: it says what is wrong and what to do."""
