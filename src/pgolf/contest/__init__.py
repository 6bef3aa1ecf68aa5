"""The organizers' side: compare scores, and later re-run and rank submissions."""
