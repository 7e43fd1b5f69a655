"""The text of the long calls in the window of `machine_code.py`, in LLVM's language: a whole collective of `places.py`.

    arrays -> which place is it? -> number, record -> dtrain_meet

Called by Python as one of its own functions, like `machine_short.py`. The GIL is free while it waits and computes. It
returns the index of the place if all is done; else, below zero, what hinders it.
"""

from dtrain.collectives.machine_short import DATA, HEAD, TYPE, UNLIKE
from dtrain.collectives.machine_source import loaded
from dtrain.collectives.records import RECORD_WORDS

BASE = HEAD + 32  # byte of an array: whose memory it is
UNDONE = -1000  # plus what `dtrain_meet` says
# The words of the head, and what the machine code takes them for.
WORDS = {
    "crew": "ptr",  # whom to wait for
    "mine": "ptr",  # my words
    "turn": "ptr",  # number of the last collective
    "source": "ptr",  # what the first array must be like: see dtrain_like
    "target": "ptr",  # what the second array must be like
    "array": "ptr",  # the type of arrays
    "block": "ptr",  # the type of what owns the memory of arrays in the window
    "rows": "ptr",  # the places
    "places": "i64",  # how many
    "found": "i64",  # which it was
}
WORD = {name: word for word, name in enumerate(WORDS)}
ROW = 3 + RECORD_WORDS - 1  # words: addresses of both arrays, of the job; the record, all but its number


def window() -> str:
    """The function."""
    return _WINDOW.replace("LOADS", loaded(WORDS, "head"))


_WINDOW = f"""
; Whether an array lies in memory of this type: its base, or the base of that if it is an array.
define i1 @dtrain_at_home(ptr %x, ptr %array, ptr %block) {{
entry:
  %base.at = getelementptr i8, ptr %x, i64 {BASE}
  %base = load ptr, ptr %base.at
  %none = icmp eq ptr %base, null
  br i1 %none, label %no, label %some
some:
  %type.at = getelementptr i8, ptr %base, i64 {TYPE}
  %type = load ptr, ptr %type.at
  %view = icmp eq ptr %type, %array
  br i1 %view, label %deeper, label %tell
deeper:
  %root.at = getelementptr i8, ptr %base, i64 {BASE}
  %root = load ptr, ptr %root.at
  %rootless = icmp eq ptr %root, null
  br i1 %rootless, label %no, label %root.some
root.some:
  %root.type.at = getelementptr i8, ptr %root, i64 {TYPE}
  %root.type = load ptr, ptr %root.type.at
  br label %tell
tell:
  %owner = phi ptr [ %type, %some ], [ %root.type, %root.some ]
  %home = icmp eq ptr %owner, %block
  ret i1 %home
no:
  ret i1 false
}}

define ptr @dtrain_window(ptr %self, ptr %arguments, i64 %given) {{
entry:
  %head.at = getelementptr i8, ptr %self, i64 {DATA}
  %head = load ptr, ptr %head.at
LOADS
  %like = call i1 @dtrain_both(ptr %arguments, ptr %source, ptr %target)
  br i1 %like, label %where, label %end
where:
  %x = load ptr, ptr %arguments
  %home = call i1 @dtrain_at_home(ptr %x, ptr %array, ptr %block)
  %x.data = call i64 @dtrain_data(ptr %arguments, i64 0)
  %y.data = call i64 @dtrain_data(ptr %arguments, i64 1)
  br i1 %home, label %look, label %end
look:
  %k = phi i64 [ 0, %where ], [ %k2, %another ]
  %more = icmp ult i64 %k, %places
  br i1 %more, label %one, label %end
one:
  %row = getelementptr [{ROW} x i64], ptr %rows, i64 %k
  %from = load i64, ptr %row
  %to.at = getelementptr i64, ptr %row, i64 1
  %to = load i64, ptr %to.at
  %same.from = icmp eq i64 %from, %x.data
  %same.to = icmp eq i64 %to, %y.data
  %same = and i1 %same.from, %same.to
  br i1 %same, label %known, label %another
another:
  %k2 = add i64 %k, 1
  br label %look
known:
  store i64 %k, ptr %found.at
  %job.at = getelementptr i64, ptr %row, i64 2
  %job = load ptr, ptr %job.at
  %last = load i64, ptr %turn
  %number = add i64 %last, 1
  store i64 %number, ptr %turn
  %record.byte = call i64 @dtrain_record_at(i64 %number)
  %record.at = getelementptr i64, ptr %row, i64 3
  call void @dtrain_record(ptr %mine, i64 %record.byte, i64 %number, ptr %record.at)
  %thread = call ptr @PyEval_SaveThread()
  %hindrance = call i64 @dtrain_meet(ptr %crew, ptr %mine, ptr %job, i64 %number, i64 %record.byte, i64 0, i64 0)
  call void @PyEval_RestoreThread(ptr %thread)
  %done = icmp eq i64 %hindrance, 0
  %undone = add i64 %hindrance, {UNDONE}
  %code.known = select i1 %done, i64 %k, i64 %undone
  br label %end
end:
  %code = phi i64 [ {UNLIKE}, %entry ], [ {UNLIKE}, %where ], [ {UNLIKE}, %look ], [ %code.known, %known ]
  %object = call ptr @PyLong_FromLong(i64 %code)
  ret ptr %object
}}
"""
