"""Files that are whole or absent, and what is read from them, checked."""
