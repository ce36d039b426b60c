"""Adapter versions: files, registry, the gate that lets them live, canary, lineage, retention."""
