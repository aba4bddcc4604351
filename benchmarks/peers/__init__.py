"""The job against what a user would write or pick instead, on the same prompts, model and cores."""
