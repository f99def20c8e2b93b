"""What a chip is, and what it costs."""
