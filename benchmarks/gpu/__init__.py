"""What the library does on one GPU, checked and measured without a network: `python -m benchmarks.gpu`."""
