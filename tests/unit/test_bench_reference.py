"""What IMB-MPI1 and the OSU microbenchmarks print, as sizes and times of ours, and the table beside ours."""

from pathlib import Path

import pytest

from dtrain.errors import UserError
from dtrain.launch import bench_reference, bench_table
from dtrain.launch.bench_table import IN_PLACE, OUT_OF_PLACE

IMB = """\
#----------------------------------------------------------------
#    Intel(R) MPI Benchmarks 2021.7, MPI-1 part
#----------------------------------------------------------------
# Minimum message length in bytes:   0

#----------------------------------------------------------------
# Benchmarking Allreduce
# #processes = 2
# ( 2 additional processes waiting in MPI_Barrier)
#----------------------------------------------------------------
       #bytes #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]
            0         1000         0.03         0.03         0.03
         4096         1000         2.10         2.50         2.30

#----------------------------------------------------------------
# Benchmarking Allreduce
# #processes = 4
#----------------------------------------------------------------
       #bytes #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]
         4096         1000         3.10         3.50         3.30
      1048576           40       300.00       400.00       350.00

#----------------------------------------------------------------
# Benchmarking Allgather
# #processes = 4
#----------------------------------------------------------------
       #bytes #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]
         1024         1000         4.00         5.00         4.50

#---------------------------------------------------
# Benchmarking Barrier
# #processes = 4
#---------------------------------------------------
 #repetitions  t_min[usec]  t_max[usec]  t_avg[usec]
         1000         1.00         2.00         1.50

# All processes entering MPI_Finalize
"""

OSU = """\

# OSU MPI Allreduce Latency Test v7.4
# Datatype: MPI_FLOAT.
# Size       Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations
4096                    2.00              1.00              3.00        1000
# OSU MPI All-to-All Personalized Exchange Latency Test v7.4
# Size       Avg Latency(us)
1024                    7.00
"""


def tables(tmp_path: Path, text: str, ranks: int) -> dict[str, dict[int, float]]:
    (tmp_path / "told.txt").write_text(text)
    return {each.collective: each.times for each in bench_reference.read(tmp_path / "told.txt", ranks)}


def test_imb_by_the_number_of_processes_and_blocks_as_our_sizes(tmp_path):
    assert tables(tmp_path, IMB, 4) == {
        "all_reduce": {4096: 3.5, 1048576: 400.0},
        "all_gather": {4096: 5.0},
        "barrier": {0: 2.0},
    }
    assert tables(tmp_path, IMB, 2) == {"all_reduce": {0: 0.03, 4096: 2.5}}


def test_osu_the_slowest_rank_where_it_is_told(tmp_path):
    assert tables(tmp_path, OSU, 4) == {"all_reduce": {4096: 3.0}, "all_to_all": {4096: 7.0}}


@pytest.mark.parametrize(
    ("text", "ranks", "message"),
    [("nothing\n1 2 3\n", 2, "no table of IMB-MPI1"), (IMB, 3, "measured on 2, 4 ranks, and this run has 3")],
)
def test_what_cannot_be_used_is_told(tmp_path, text, ranks, message):
    with pytest.raises(UserError, match=message):
        tables(tmp_path, text, ranks)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--reference .*none.txt: cannot be read: No such file"):
        bench_reference.read(tmp_path / "none.txt", 2)


def rows():
    what = (4096, 1024, "float32", "sum")
    return [
        bench_table.row("all_reduce", what, "auto", OUT_OF_PLACE, [2e-6], 0, 2),
        bench_table.row("all_reduce", what, "auto", IN_PLACE, [1e-6], 0, 2),
        bench_table.row("all_reduce", what, "gloo", IN_PLACE, [9e-6], 0, 2),
    ]


def test_ratios_take_our_faster_placing():
    assert bench_reference.times_of(rows(), "all_reduce", "gloo") == {4096: pytest.approx(9.0)}
    lines = bench_reference.beside(rows(), "all_reduce", "imb", {4096: 8.0, 8192: 1.0}, ("auto", "shared"))
    assert lines[-1].split() == ["4096", "8.00", "1.00", "8.00x"]
    (line,) = bench_reference.beside(rows(), "all_reduce", "imb", {8192: 1.0}, ("auto",))
    assert "none of its sizes" in line
