"""Stand-ins for a device or a service, for tests whose subject is neither."""
