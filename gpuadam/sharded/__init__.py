"""Adam over many ranks."""
