"""The measurements behind the published numbers."""
