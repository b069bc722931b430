"""The engine: requests in, batches through a compiled step, tokens out."""
