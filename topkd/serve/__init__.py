"""The embedded server: any Hugging Face causal LM behind vLLM's dialects, for laptops, tests and the demo."""
