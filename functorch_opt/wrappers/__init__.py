"""Transformation in, transformation out."""
