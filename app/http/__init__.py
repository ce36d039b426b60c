"""The HTTP application of an executor: middleware chain, errors and routes."""
