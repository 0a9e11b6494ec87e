"""Everything that touches a process, a socket, a GPU or a disk."""

__version__ = "0.1.0"
