"""Block programs: an energy block as data, and its evaluation."""
