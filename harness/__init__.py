"""Everything that touches a process, a socket, a GPU or a disk.

Rooms, in the order in which data goes through them; none imports from a later one: ``records``,
``machine``, ``servers``, ``mock``, ``configs``, ``live``, ``experiments``, ``rehearsals``,
``evidence``, ``hypotheses``, ``commands``. Beside them: the command line and its exit statuses.
"""

__version__ = "0.1.0"
