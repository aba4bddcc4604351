"""RabbitMQ → the database: a queue's messages become prompts, and are acknowledged once these are safe."""
