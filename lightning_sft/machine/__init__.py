"""What is asked of devices, allocators, compilers and the terminal."""
