"""This machine: its GPUs, cores, terminal and signals, and what it can do at most."""
