"""Shared by all measurements: engines and servers under test, clients, statistics."""
