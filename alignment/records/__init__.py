"""Records of feedback: kinds, chat texts, preference pairs, and the row formats of other tools."""
