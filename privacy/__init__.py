"""What may leave a client, and what it costs."""
