"""A server without a GPU: the scheduler model on the wall clock, in both dialects."""
