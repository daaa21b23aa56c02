"""Prove a variant: the audit, measured quality, and real loaders in environments of their own."""
