"""What prefix sharing and KV pruning gain, what they cost, and whether memory holds: `mace bench memory`."""
