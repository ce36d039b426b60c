"""Measurements that back numbers in docs/. Never imported by the rest."""
