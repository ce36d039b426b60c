"""Reports of an executor and of Control on themselves: metrics, status, signs of life, responses on their way."""
