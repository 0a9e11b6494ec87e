"""From probes to the step time and the ceilings of a server."""
