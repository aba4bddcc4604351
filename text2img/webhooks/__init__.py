"""Notify receivers of outcomes: the callback and the prompts' own webhooks, from one outbox.

Requests are signed as Standard Webhooks 1.0 has it, and are sent at least once.
"""
