"""The demo: its vocabulary, its prompts and its small trained model."""
