"""Encoders, predictors, decoders, and the energy that joins them."""
