"""What is trained, token by token."""
