"""All rules: importing this module registers them."""

from relu_doctor.diagnose import coverage_rules, learning_rate_rules, mechanism_rules

__all__ = ["coverage_rules", "learning_rate_rules", "mechanism_rules"]
