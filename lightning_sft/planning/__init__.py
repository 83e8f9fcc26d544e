"""What a fit needs, before it is begun: memory on each device, and steps."""
