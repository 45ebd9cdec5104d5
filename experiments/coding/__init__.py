"""Codes for notes: figures, and what a model is measured against."""
