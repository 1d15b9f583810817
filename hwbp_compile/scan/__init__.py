"""The linear recurrence along the residual path."""

from .op import linear_scan as linear_scan
from .path import scan_path as scan_path

__all__ = ["linear_scan", "scan_path"]
