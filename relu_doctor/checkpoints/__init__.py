"""Files in: checkpoints, models and data, read without running what is in them."""
