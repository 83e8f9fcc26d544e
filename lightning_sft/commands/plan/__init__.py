"""``plan``: prediction of the memory and the steps of a fit."""
