"""From what a run shows to estimates with honest errors."""
