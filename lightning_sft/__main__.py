"""``python -m lightning_sft``."""

from lightning_sft.main import console

if __name__ == "__main__":
    console()
