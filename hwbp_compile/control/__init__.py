"""What can be changed and seen while a model trains."""
