"""Stages, timeouts, backoff and file locks. Knows nothing of images or databases."""
