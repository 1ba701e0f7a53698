"""The autograd graph behind a pre-activation: which parameters feed it, and which of its axes count units."""
