"""Adapter versions going live: names, pointer, canary, warm caches."""
