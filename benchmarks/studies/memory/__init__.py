"""`mace bench memory`: gains and costs of prefix sharing and KV pruning, and a soak of the memory."""
