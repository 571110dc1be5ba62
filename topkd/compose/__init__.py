"""The commands as library functions: train, score, replay, compare. Connects all other subpackages."""
