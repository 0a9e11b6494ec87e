"""Engines and their servers: how they are started and asked, and what they show."""
