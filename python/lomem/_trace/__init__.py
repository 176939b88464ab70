"""What a model does while it runs, and what passes between its modules."""
