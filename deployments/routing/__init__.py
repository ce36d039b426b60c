"""Routing of requests to executors by load and by cached prefix."""
