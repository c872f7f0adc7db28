"""Measurements of a model under the new policy, with their uncertainty."""
