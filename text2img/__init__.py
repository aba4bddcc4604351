"""Text to images in batches: claim → generate → encode → store → record → notify."""

__version__ = "0.2.0"
