"""Collective algorithms as data: described once, then proven, simulated, drawn and run.

from dtrain.collectives.schedules import schedule
from dtrain.collectives.schedules.prover import prove

prove(schedule("all_reduce", "ring", size=6)).steps     # 10
"""

from dtrain.collectives.schedules.catalogue import ALGORITHMS, schedule
from dtrain.collectives.schedules.schedule import Algorithm, Cost, Fold, Receive, Schedule, Send, Step, bind

__all__ = ["ALGORITHMS", "Algorithm", "Cost", "Fold", "Receive", "Schedule", "Send", "Step", "bind", "schedule"]
