"""The energies that blocks of analog layers minimise. Each is a value that answers all questions about it."""
