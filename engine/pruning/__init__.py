"""KV pruning: which blocks go, attention without them, and what that costs in accuracy."""
