"""Commands, options, tables and JSON: the only writer of results and reader of the environment."""
