"""Writing dataset folders: from any text, or from what is installed."""
