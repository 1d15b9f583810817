"""What was rewritten, what was not, and why."""
