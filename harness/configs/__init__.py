"""The sections of a config, and what follows from it before there is any server."""
