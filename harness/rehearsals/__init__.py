"""Experiments, searches and fleets in virtual time, on servers whose truth is known."""
