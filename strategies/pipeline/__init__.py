"""Pipeline parallelism: the model cut into stages, microbatches on their way through them.

schedules.py   in which order a rank works           timeline.py   checked, timed, memory counted
greedy.py      orders made by a rule                 drawing.py    pictures of planned and measured time
user.py        orders from the user                  cut.py        where the model is cut
"""
