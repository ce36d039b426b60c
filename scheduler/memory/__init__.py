"""Memory of a device: KV blocks and the fine-tune arena under one capacity."""
