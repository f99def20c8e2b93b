"""The passes of the compiler, from a captured graph to a runnable hybrid."""
