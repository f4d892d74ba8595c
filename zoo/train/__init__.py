"""Training: a recipe says what, one engine does it, a run folder holds all of it."""
