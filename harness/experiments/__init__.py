"""From a config to a verdict: predicted, planned, driven, searched and judged."""
