"""What a model takes and how fast it could be, before anything is loaded (no torch).

from cabochon.sizing import Workload, hardware, plan
print(plan("E4B", hardware.find("4090"), Workload(context=32768, users=4)).summary())
"""

from . import hardware, units
from .hardware import Hardware
from .memory import Memory, Workload
from .plan import MemoryPlan, plan, ranking
from .speed import Speed
from .start import Start, start

__all__ = [
    "Hardware",
    "Memory",
    "MemoryPlan",
    "Speed",
    "Start",
    "Workload",
    "hardware",
    "plan",
    "ranking",
    "start",
    "units",
]
