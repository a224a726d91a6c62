"""Tables of bad input, and what runs them; tests/test_bad_input.py holds the claims."""
