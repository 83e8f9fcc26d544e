"""What comes from a user and goes to one: arguments, errors, files."""
