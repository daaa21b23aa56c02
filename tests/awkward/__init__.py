"""Inputs as people really bring them, alone and combined: each builds what transformers computes, or is refused early.

A trouble is a small function that changes a sound base model's folder or its recipe, with the public thread where
somebody had it. `python -m tests.awkward --seed 7 --most 2000 --minutes 30` combines two or three at a time.
"""
