"""Drift: what has changed, how alarming that is, and how much training it calls for."""
