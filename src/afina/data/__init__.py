"""Files in, token batches out. Knows nothing of models: what it hands up is numbers and where they came from."""
