"""What a run says of itself to those who watch many: figures for Prometheus, spans for OpenTelemetry.

It reads what the flow counts and times anyway (tally, stopwatch, progress) and is never asked by it. The two
vendors' libraries are extras; each is imported in its own module, when somebody asks for it.
"""
