"""1. A file becomes conversations, each with its file:line."""
