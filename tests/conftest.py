"""Property tests explore at random by hand, and repeat themselves where a machine decides."""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Marks by which `scripts/test` decides what runs beside what."""
    config.addinivalue_line("markers", "live: keeps time by the clock, with servers and loads")
    config.addinivalue_line("markers", "waits: waits for processes more than it computes")
