"""Models of the server and inferences from data. No clock, no randomness of its own, no network."""
