"""What came out of a run: exported, merged, asked, scored, measured, drawn."""
