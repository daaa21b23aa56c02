"""The inputs of a build: the base model and the texts."""
