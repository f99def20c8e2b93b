"""Which layers bear analog devices, and on which hardware: plans that are measured with a metric of the user's."""
