"""What a build reads: the base model and the texts."""
