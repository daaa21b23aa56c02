"""The flow: the plan, the stages, the state of a build, its folders, and a release run."""
