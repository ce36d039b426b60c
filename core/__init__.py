"""Nouns and seams that every other package shares; imports nothing of ours, no torch, no ray."""
