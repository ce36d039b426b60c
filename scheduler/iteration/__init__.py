"""One engine iteration: the plan, who is in it, and how much time is left for fine-tune slices."""
