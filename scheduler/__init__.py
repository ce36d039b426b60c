"""Decisions, as pure functions of state and time: priority, queue, packing, iteration plans."""
