"""Devices, allocators, compilers and the terminal."""
