"""From runs to a verdict, and why."""
