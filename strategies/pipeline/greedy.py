"""Schedules made by a rule instead of a formula: whoever is free takes the best action that is ready.

    at each moment, for each free rank:  a backward (I) that is ready  >  a forward, if memory allows  >  a W

On a V (rank r has stages r and 2p-1-r) it gives ZB-V's picture: forwards run down and up again, the backwards of the
later stage come first, weight gradients fill the holes.
Reference: Qi et al., arXiv:2401.10241, section 6, and their heuristic (section 4).
"""

from __future__ import annotations

from functools import lru_cache

from dtrain.strategies.pipeline.schedules import Action, Program


@lru_cache(maxsize=8)
def v_shaped(ranks: int, microbatches: int) -> list[Program]:
    """The programs of all ranks for 2 x ranks stages on a V, all actions taking one unit of time."""
    stages = 2 * ranks
    own = [(rank, stages - 1 - rank) for rank in range(ranks)]
    limit = 2 * ranks  # (stage, microbatch) pairs held by a rank: what 1F1B holds in stages of half the size
    programs: list[Program] = [[] for _ in range(ranks)]
    stop: dict[Action, int] = {}
    held = [0] * ranks
    following = {(stage, kind): 0 for stage in range(stages) for kind in "FIW"}  # the next microbatch of each

    def ready(stage: int, kind: str, now: int) -> bool:
        m = following[stage, kind]
        before = [Action(stage, "F" if kind == "I" else "I", m)] if kind != "F" else []
        if kind == "F" and stage > 0:
            before.append(Action(stage - 1, "F", m))
        if kind == "I" and stage < stages - 1:
            before.append(Action(stage + 1, "I", m))
        return m < microbatches and all(stop.get(action, now + 1) <= now for action in before)

    now = 0
    total = 3 * microbatches * stages
    while len(stop) < total:
        for rank in range(ranks):
            near, far = own[rank]
            # The way back needs the far stage: one place is kept for it, else everybody could be full on the way out.
            room = {near: limit - 1, far: limit}
            order = [(far, "I"), (near, "I"), (far, "F"), (near, "F"), (far, "W"), (near, "W")]
            for stage, kind in order:
                if ready(stage, kind, now) and (kind != "F" or held[rank] < room[stage]):
                    action = Action(stage, kind, following[stage, kind])
                    programs[rank].append(action)
                    stop[action] = now + 1
                    following[stage, kind] += 1
                    held[rank] += {"F": 1, "I": 0, "W": -1}[kind]
                    break
        now += 1
    return programs
