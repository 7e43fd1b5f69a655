"""Ranks that wait for one another for ever, found by running a schedule with messages that wait for their partner.

Only asked when a schedule is already known to be wrong: it tells a deadlock from a step that is merely misplaced.
"""

from collections import Counter

from dtrain.collectives.schedules.schedule import Schedule

# A message is found by (source, target, the how-manieth between the two).
_Key = tuple[int, int, int]


def waiting_cycle(schedule: Schedule) -> tuple[int, int, int | None, str] | None:
    """(rank, step, chunk, text) of a cycle of ranks each of which waits for the next; None where there is none.

    None as well where a message has no partner at all: that is the mistake to tell then.

    A rank goes on to its next step when all messages of the present one have met their partner.
    """
    programs: list[list[list[tuple[_Key, bool, int | None]]]] = []
    for rank in range(schedule.size):
        counts: Counter[tuple[int, int]] = Counter()
        program = []
        for actions in schedule.of(rank):
            messages = []
            both = [(rank, s.peer, True, s.chunks) for s in actions.sends]
            both += [(r.peer, rank, False, r.chunks) for r in actions.receives]
            for source, target, outgoing, chunks in both:
                key = (source, target, counts[source, target])
                counts[source, target] += 1
                messages.append((key, outgoing, chunks[0] if chunks else None))
            program.append(messages)
        programs.append(program)

    ends = Counter((key, outgoing) for program in programs for step in program for key, outgoing, _ in step)
    if any((key, not outgoing) not in ends for key, outgoing in ends):
        return None
    at = [0] * schedule.size
    posted: set[tuple[_Key, bool]] = set()

    def post(rank: int) -> None:
        if at[rank] < len(programs[rank]):
            posted.update((key, outgoing) for key, outgoing, _ in programs[rank][at[rank]])

    for rank in range(schedule.size):
        post(rank)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program) and all((key, not out) in posted for key, out, _ in program[at[rank]]):
                at[rank] += 1
                post(rank)
                moved = True

    waits: dict[int, tuple[int, int | None, bool]] = {}  # rank -> whom it waits for, with which chunk
    for rank, program in enumerate(programs):
        if at[rank] < len(program):
            key, out, chunk = next(m for m in program[at[rank]] if (m[0], not m[1]) not in posted)
            waits[rank] = (key[1] if out else key[0], chunk, out)
    for start in sorted(waits):
        path = [start]
        while path[-1] in waits and waits[path[-1]][0] not in path:
            path.append(waits[path[-1]][0])
        if path[-1] in waits and waits[path[-1]][0] == start:
            links = [
                f"rank {r} in step {at[r]} waits to {'send' if waits[r][2] else 'receive'} "
                f"{'to' if waits[r][2] else 'from'} rank {waits[r][0]}"
                for r in path
            ]
            return start, at[start], waits[start][1], "deadlock: " + ", ".join(links)
    return None
