"""The learning loop of an executor: batches in, candidates out."""
