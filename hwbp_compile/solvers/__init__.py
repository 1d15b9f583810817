"""Solvers for the cotangents of a chain; one solver a file."""

from .iterate import solve as solve

__all__ = ["solve"]
