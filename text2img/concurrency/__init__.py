"""Stages, timeouts, backoff, signals and file locks; independent of images and databases."""
