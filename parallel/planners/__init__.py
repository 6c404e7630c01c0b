"""Planners: pure functions from rows per source rank and expert to a dispatch plan."""

from parallel.planners.home import home_plan

__all__ = ["home_plan"]
