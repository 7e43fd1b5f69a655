"""Pipeline schedules: bubbles, memory, messages against the formulas; wrong ones refused; pictures; cuts.

Checks of the course: 41 and 42 (bubble of GPipe and 1F1B, speed-up over naive), 43 (in flight), 44 (warm-up), 45
(interleaved: bubble, messages, microbatches that do not fit).
"""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from dtrain.errors import UserError
from dtrain.strategies.pipeline.cut import balanced, by_hand
from dtrain.strategies.pipeline.drawing import draw_svg, draw_text
from dtrain.strategies.pipeline.schedules import SCHEDULES, Action, ScheduleError, programs
from dtrain.strategies.pipeline.timeline import SECONDS, Timeline
from dtrain.strategies.pipeline.user import to_csv

SIZES = [1, 2, 3, 4, 8]
COUNTS = [1, 2, 3, 4, 8, 16, 33]


def timeline(name, ranks, microbatches, chunks=None, **options):
    return Timeline(programs(name, ranks, microbatches, chunks), **options)


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("microbatches", COUNTS)
def test_the_bubble_is_that_of_the_formula(ranks, microbatches):
    p, m = ranks, microbatches
    assert timeline("naive", p, m).bubble == pytest.approx(1 - 1 / p)
    assert timeline("gpipe", p, m).bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline("1f1b", p, m).bubble == pytest.approx((p - 1) / (m + p - 1))
    for chunks in (1, 2, 3):
        if m % p == 0:
            assert timeline("interleaved", p, m, chunks).bubble == pytest.approx((p - 1) / (chunks * m + p - 1))
    if m >= p:
        assert timeline("zb_h1", p, m).length == pytest.approx(3 * m + p - 1)  # (p-1)(tF + tI - tW), all 1
    if m >= 2 * p:  # stages of half the size; 6 m + p - 1 would be no bubble but the wait for the first forward
        assert timeline("zb_v", p, m).length <= 6 * m + p - 1 + p // 2


@pytest.mark.parametrize(
    ("p", "m", "bubble"),
    [
        (4, 4, 0.429),
        (4, 8, 0.273),
        (4, 16, 0.158),
        (4, 32, 0.086),
        (4, 64, 0.045),
        (4, 100, 0.029),
        (8, 16, 0.304),
        (8, 32, 0.179),
        (16, 32, 0.319),
        (16, 64, 0.190),
        (32, 64, 0.326),
    ],
)
def test_the_numbers_of_the_course(p, m, bubble):
    for name in ("gpipe", "1f1b"):
        assert round(timeline(name, p, m).bubble, 3) == bubble
    speed_up = timeline("naive", p, m).length / timeline("gpipe", p, m).length
    assert speed_up == pytest.approx(p * m / (m + p - 1))


@pytest.mark.parametrize(
    "seconds", [SECONDS, {"F": 1.0, "B": 1.0, "I": 0.7, "W": 0.3}, {"F": 2, "B": 9, "I": 5, "W": 4}]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_times_of_the_actions_make_a_schedule_hang(name, seconds):
    for ranks, microbatches in itertools.product(SIZES, COUNTS):
        if name != "interleaved" or microbatches % ranks == 0:
            assert timeline(name, ranks, microbatches, seconds=seconds, transfer=0.5).length > 0


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize("microbatches", COUNTS)
def test_in_flight(ranks, microbatches):
    p, m = ranks, microbatches
    assert timeline("gpipe", p, m).in_flight() == [m] * p
    assert timeline("naive", p, m).in_flight() == [1] * p
    assert timeline("1f1b", p, m).in_flight() == [min(m, p - rank) for rank in range(p)]
    assert max(timeline("zb_h1", p, m).in_flight()) == min(m, p)
    assert max(timeline("zb_v", p, m).in_flight()) <= 2 * p  # stages of half the size: the memory of 1F1B


def actions(text):
    return [Action(int(word[0]), word[1], int(word[2])) for word in text.split()]


def test_activations_are_held_until_the_gradient_of_the_weights():
    assert Timeline([actions("0F0 0I0 0F1 0W0 0I1 0W1")]).in_flight() == [2]
    assert Timeline([actions("0F0 0I0 0W0 0F1 0I1 0W1")]).in_flight() == [1]


def test_what_stays_on_a_rank_is_not_transferred():
    assert Timeline([actions("0F0 1F0 1B0 0B0")], transfer=10.0).length == 1 + 1 + 2 + 2
    assert Timeline([actions("0F0 0B0"), actions("1F0 1B0")], transfer=10.0).length == 1 + 10 + 1 + 2 + 10 + 2


def test_warm_up_and_order_of_backwards():
    for p, m in itertools.product(SIZES, COUNTS):
        for rank, program in enumerate(programs("1f1b", p, m)):
            first = next(place for place, action in enumerate(program) if action.kind == "B")
            assert first == min(m, p - rank - 1) + (1 if m > p - rank - 1 else 0)
    for name, row in SCHEDULES.items():
        for program in programs(name, 4, 8):
            for stage in {action.stage for action in program}:
                for kinds in ("F", "BI", "W"):
                    order = [a.microbatch for a in program if a.stage == stage and a.kind in kinds]
                    assert order == sorted(order), name
            assert row.split == any(action.kind == "W" for action in program)


def test_messages():
    assert timeline("1f1b", 4, 8).messages == 2 * 8 * 3
    for chunks in (1, 2, 3):
        # v (p-1) ways within the chunks, and v-1 from the last rank to the first
        assert timeline("interleaved", 4, 8, chunks).messages == 2 * 8 * (4 * chunks - 1)
    assert timeline("zb_v", 4, 8).messages == 2 * 8 * 6  # the turn of the V is on one rank


def test_interleaving_halves_the_bubble_and_refuses_what_does_not_fit():
    long, short = timeline("1f1b", 4, 8), timeline("interleaved", 4, 8, 2)
    idle = long.length - 3 * 8, short.length / 2 - 3 * 8  # a stage of two is half as long
    assert idle[1] == pytest.approx(idle[0] / 2)
    with pytest.raises(ScheduleError, match=r"6 microbatches on 4 ranks; allowed: multiples of the ranks.* 4 or 8"):
        programs("interleaved", 4, 6)


def test_wrong_schedules_are_refused_by_name_place_and_action():
    right = programs("1f1b", 2, 2)
    Timeline(right)

    def refused(change, message):
        wrong = [list(program) for program in right]
        change(wrong)
        with pytest.raises(ScheduleError, match=message):
            Timeline(wrong)

    refused(lambda p: p[1].pop(), r"rank 1, stage 1, microbatch 1: has F; needed: F and B")
    refused(lambda p: p[0].append(Action(0, "F", 0)), r"rank 0, action 4: 0F0: a second time")
    refused(lambda p: p[0].insert(0, Action(0, "B", 1)), r"rank 0, action 0: 0B1: before 0F1")
    refused(lambda p: p[1].append(Action(0, "I", 0)), r"rank 1, action 4: 0I0: stage 0 is on rank 0")
    refused(lambda p: p[0].append(Action(0, "X", 0)), r"0X0: allowed: <stage>F\|B\|I\|W")
    refused(lambda p: p[0].append(Action(0, "I", 1)), r"0I1: the backward of this microbatch is there already")
    refused(lambda p: p[1].clear(), r"rank 1 has nothing to do")
    refused(
        lambda p: p[1].__setitem__(slice(None), [Action(2, *action[1:]) for action in p[1]]), r"stage 1 of 3 is on no"
    )
    orders = ["0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"]  # each waits for the other's next
    circle = [actions(order) for order in orders]
    with pytest.raises(ScheduleError, match=r"rank 0 at 0B0 \(action 1\) waits for 1B0 of rank 1; rank 1 at 1F1"):
        Timeline(circle)
    for name, message in (("1f2b", "allowed: naive, gpipe"), ("nowhere.csv", "no file nowhere.csv")):
        with pytest.raises(ScheduleError, match=message):
            programs(name, 2, 2)
    with pytest.raises(ScheduleError, match=r"microbatches=0"):
        programs("1f1b", 2, 0)


def test_schedules_of_the_user(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(to_csv(programs("zb_h1", 3, 4)))
    assert programs(str(file), 3, 4) == programs("zb_h1", 3, 4)
    with pytest.raises(ScheduleError, match=r"for 3 ranks; here are 2"):
        programs(str(file), 2, 4)
    with pytest.raises(ScheduleError, match=r"has 4 microbatches; asked for: 5"):
        programs(str(file), 3, 5)
    file.write_text("0F0,,0B0\n1F0,oops,1B0\n")
    with pytest.raises(ScheduleError, match=r"mine.csv, line 2, cell 2: 'oops'"):
        programs(str(file), 2, 1)
    file.write_bytes("0F0,0B0 ä".encode("latin-1"))
    with pytest.raises(ScheduleError, match=r"mine.csv: cannot be read as a CSV file in UTF-8"):
        programs(str(file), 2, 1)
    code = tmp_path / "mine.py"
    code.write_text(
        "def order(rank, ranks, microbatches, chunks):\n"
        "    return [(rank, kind, m) for kind in 'FB' for m in range(microbatches)]\n"
    )
    assert programs(f"{code}:order", 3, 4) == programs("gpipe", 3, 4)
    with pytest.raises(ScheduleError, match="no function of this name"):
        programs(f"{code}:other", 3, 4)


def test_pictures():
    times = timeline("1f1b", 4, 4)
    assert draw_text(times.spans, 4).splitlines()[3] == "rank 3        0 0───1 1───2 2───3 3───"
    tree = ElementTree.fromstring(draw_svg([("planned", times.spans), ("again", times.spans)], 4))
    boxes = [element for element in tree.iter() if element.tag.endswith("title")]
    assert len(boxes) == 2 * len(times.spans) == 2 * 2 * 4 * 4


def test_cuts_are_the_best_of_all():
    assert balanced([5, 1, 1, 1, 1, 5], 3) == [1, 4, 1]
    for costs in ([1, 1, 1, 1, 1], [3, 1, 4, 1, 5, 9, 2], [10, 1, 1, 1], [1, 1, 1, 10]):
        for stages in range(1, len(costs) + 1):
            sizes = balanced(costs, stages)
            assert sum(sizes) == len(costs) and min(sizes) >= 1 and len(sizes) == stages
            best = min(
                max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))
                for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
            )
            places = [0, *itertools.accumulate(sizes)]
            assert max(sum(costs[a:b]) for a, b in itertools.pairwise(places)) == best
    with pytest.raises(UserError, match=r"parallel.pp: 3 stages need as many blocks; the model has 2"):
        balanced([1, 1], 3)
    assert by_hand([1, 3], 4, 2) == [1, 3]
    with pytest.raises(UserError, match=r"pipeline.cut: \[1, 2\]; allowed: 2 numbers from 0 with the sum 4"):
        by_hand([1, 2], 4, 2)
