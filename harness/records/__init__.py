"""The results folder and its streams: what is written beside the load, and kept."""
