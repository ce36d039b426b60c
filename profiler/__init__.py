"""Measure what iterations and slices cost, fit it, predict it, and correct the prediction online."""
