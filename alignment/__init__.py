"""Feedback records and their store, pairing, drift, the gate and the adapter registry."""
