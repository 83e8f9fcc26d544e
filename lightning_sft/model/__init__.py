"""A pretrained model as the weighted log-likelihood of a batch."""
