"""The judge: what a score is, and nothing that the submission says about it."""
