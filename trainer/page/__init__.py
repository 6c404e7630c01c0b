"""The page of a run: its history on disk, and one HTML file that shows it."""
