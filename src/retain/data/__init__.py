"""Reading, checking and drawing data."""
