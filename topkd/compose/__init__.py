"""The rooms plugged together: train, score, replay, compare as library functions over one frozen config."""
