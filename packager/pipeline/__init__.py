"""The flow: the plan, its stages, what is done, where it lies, and a release run."""
