"""From a verdict to operation: room left, what to change, how many replicas, every night."""
