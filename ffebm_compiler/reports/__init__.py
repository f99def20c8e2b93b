"""Reports: what is measured of a hybrid or a plan, and its text. They change nothing."""
