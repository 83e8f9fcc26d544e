"""Input from and output to the user: arguments, errors, files."""
