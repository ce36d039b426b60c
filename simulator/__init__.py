"""The production scheduler on a predicted executor in virtual time. No torch, no ray, no clock."""
