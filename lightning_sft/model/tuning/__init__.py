"""Which parts of a model are trained: adapters, frozen parameters, new tokens."""
