"""The scorer: from an artifact and a text to a record."""
