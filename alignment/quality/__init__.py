"""Which feedback is weighted down, and why."""
