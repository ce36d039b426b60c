"""Prefixes of prompts: which executor caches which, and which ones come again and again."""
