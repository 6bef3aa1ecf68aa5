"""Tools of a participant: train and score in one go, and ablations over it."""
