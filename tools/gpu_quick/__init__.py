"""What eight minutes on a machine with a GPU can show: see __main__.py."""
