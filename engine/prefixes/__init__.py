"""What vLLM's prefix cache holds and serves."""
