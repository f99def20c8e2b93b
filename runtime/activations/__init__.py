"""The activations that an energy block can hold."""
