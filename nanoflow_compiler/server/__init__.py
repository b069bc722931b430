"""The OpenAI-compatible HTTP server; it knows the engine only through ``engine_client``."""
