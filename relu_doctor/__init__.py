"""relu_doctor: find the ReLU units of a PyTorch model that have died, and say how sure that is, why, and what to do."""
