"""The hypotheses and published cases of the theory, put to simulators."""
