"""What feedback is: kinds, texts, preference pairs, and the row formats of other tools."""
