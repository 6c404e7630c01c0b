"""Planners: pure functions from rows per source rank and expert to a dispatch plan."""

from parallel.planners.home import home_plan
from parallel.planners.least_loaded import LeastLoaded
from parallel.planners.materialize import Materialize
from parallel.planners.quota import Quota
from parallel.planners.replicated import Replicated
from parallel.planners.stateful import StatefulPlanner
from parallel.planners.sticky import Sticky

__all__ = [
    "LeastLoaded",
    "Materialize",
    "Quota",
    "Replicated",
    "StatefulPlanner",
    "Sticky",
    "home_plan",
]
