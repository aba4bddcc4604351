"""Logs, progress, statistics, Prometheus metrics and OpenTelemetry spans of a run.

Metrics and spans are derived from what the flow counts and times anyway. The libraries of both vendors are
extras; each is imported in its own module, and only when the settings enable it.
"""
