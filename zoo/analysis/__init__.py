"""What a model costs, from its config alone."""
