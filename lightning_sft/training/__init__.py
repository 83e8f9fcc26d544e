"""Everything around a training step: trainer properties, checks, optimizers, schedules, throughput."""
