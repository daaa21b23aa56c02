"""Is it right: the audit, measured quality, and real loaders in environments of their own."""
