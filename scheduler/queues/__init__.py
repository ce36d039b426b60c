"""Waiting orders of requests and of fine-tune tasks."""
