"""The job: claim → generate → encode → store → record → notify."""
