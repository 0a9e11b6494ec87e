"""Property tests explore at random by hand, and repeat themselves where a machine decides."""

import os

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """A mark for tests that want the machine to themselves; `scripts/test` runs them last."""
    config.addinivalue_line("markers", "live: keeps time by the clock, with servers and loads")
