"""Mixtures of experts: built from dense models, matched to one another, reduced to fewer experts."""
