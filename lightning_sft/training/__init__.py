"""What happens around a step: the trainer's facts, checks, optimizers, throughput."""
