"""One suite, two servers: a real vLLM in a subprocess and the embedded server must answer the same requests alike."""
