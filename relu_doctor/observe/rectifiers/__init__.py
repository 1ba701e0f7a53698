"""Rectifiers: where their slopes are not zero, and how calls to them are recognised."""
