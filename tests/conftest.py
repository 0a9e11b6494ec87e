"""Property tests explore at random by hand, and repeat themselves where a machine decides."""

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
