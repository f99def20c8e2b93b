"""Write files that are whole or absent, and check files that are read."""
