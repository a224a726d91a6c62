"""What came out of a run: report (a picture of its record)."""
