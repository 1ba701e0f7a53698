"""Adapters to training frameworks, thin as paper over :class:`~relu_doctor.Monitor`; each needs an extra of its own."""
