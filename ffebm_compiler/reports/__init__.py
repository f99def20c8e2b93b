"""Reports measure a hybrid or a plan and write the result as text. They change nothing."""
