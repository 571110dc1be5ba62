"""How servers say it. Knows: HTTP, dialects, retries. Does not know: losses, training, caches."""
