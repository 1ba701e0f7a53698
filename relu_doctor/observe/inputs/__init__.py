"""Inputs: batches, how their inputs are counted, and which rows of a layer belong to which input."""
