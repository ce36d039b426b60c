"""Quality of feedback: pairs that are weighted down, each with the reason."""
