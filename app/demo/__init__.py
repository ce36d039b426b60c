"""`mace demo`: watch a running server learn a preference."""
