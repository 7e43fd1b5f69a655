"""The text of the long calls of `machine_code.py`, in LLVM's language: all chunks of a collective of `long.py`.

    for each chunk   is my slot free? -> number, record -> aims of the job -> dtrain_meet

Python calls `dtrain_long` as one of its own functions, as `dtrain_short` (`machine_short.py`). The GIL is free from the
first chunk to the last. It never waits for ever: it returns what hinders it and writes down in which chunk, and Python
goes on from there.
"""

from dtrain.collectives import cross_memory
from dtrain.collectives.machine_short import DATA
from dtrain.collectives.machine_source import loaded
from dtrain.collectives.records import ASIDE, RECORD_WORDS

# What a call returns: 0, or of a meeting what `dtrain_meet` does, or
UNLIKE, NOT_FREE = -5, -6  # nothing was done; the slot of this chunk is not free

AIMS = 23  # the word of a job (`meeting.py`) with the address of its aims, (address, 1 if of the second array, bytes),
# and after it how many they are.

# The words of a call, and what the machine code takes them for. `record` and those after it: all but its number.
CALL = {
    "crew": "ptr",  # all peers
    "mine": "ptr",  # my words
    "turn": "ptr",  # the number of the last collective
    "source": "ptr",  # what the first array must be like: see dtrain_like
    "target": "ptr",  # what the second array must be like
    "arena": "ptr",  # how many ranges of addresses, and begin and end of each: neither array lies there
    "place": "i64",  # 0; or where the first array lies, which is in such a range
    "apart": "i64",  # 1: the arrays share no byte; 0: the second begins `shift` bytes after the first
    "shift": "i64",
    "x.bytes": "i64",  # of the first
    "y.bytes": "i64",  # of the second
    "chunks": "ptr",  # rows: byte where it begins in both arrays, its job for each slot
    "number.of": "i64",  # chunks
    "slots": "i64",  # of which they take turns; 1: none is used, and there is one job
    "home": "i64",  # 1: the address of the first array is put aside
    "reached": "i64",  # written: the chunk that is not done
    "record": "i64",
}
WORD = {name: word for word, name in enumerate(CALL)}
WORDS = len(CALL) - 1 + RECORD_WORDS - 1


def long() -> str:
    """The function."""
    return _LONG.replace("LOADS", loaded(CALL, "call"))


_LONG = f"""
define ptr @dtrain_long(ptr %self, ptr %arguments, i64 %given) {{
entry:
  %call.at = getelementptr i8, ptr %self, i64 {DATA}
  %call = load ptr, ptr %call.at
LOADS
  %like = call i1 @dtrain_both(ptr %arguments, ptr %source, ptr %target)
  br i1 %like, label %begin, label %end
begin:
  %x.data = call i64 @dtrain_data(ptr %arguments, i64 0)
  %y.data = call i64 @dtrain_data(ptr %arguments, i64 1)
  %x.end = add i64 %x.data, %x.bytes
  %y.end = add i64 %y.data, %y.bytes
  %after = icmp uge i64 %y.data, %x.end
  %before = icmp uge i64 %x.data, %y.end
  %disjoint = or i1 %after, %before
  %difference = sub i64 %y.data, %x.data
  %shifted = icmp eq i64 %difference, %shift
  %is.apart = icmp ne i64 %apart, 0
  %lie.well = select i1 %is.apart, i1 %disjoint, i1 %shifted
  br i1 %lie.well, label %where, label %end
where:
  %placed = icmp ne i64 %place, 0
  br i1 %placed, label %known, label %ranges
known:
  %x.there = icmp eq i64 %x.data, %place
  br i1 %x.there, label %private, label %end
ranges:
  %all = load i64, ptr %arena
  br label %look
look:
  %k = phi i64 [ 0, %ranges ], [ %k2, %range ]
  %more = icmp ult i64 %k, %all
  br i1 %more, label %range, label %private
range:
  %two = shl i64 %k, 1
  %low.word = add i64 %two, 1
  %low.at = getelementptr i64, ptr %arena, i64 %low.word
  %low = load i64, ptr %low.at
  %high.at = getelementptr i64, ptr %low.at, i64 1
  %high = load i64, ptr %high.at
  %length = sub i64 %high, %low
  %x.from = sub i64 %x.data, %low
  %y.from = sub i64 %y.data, %low
  %x.in = icmp ult i64 %x.from, %length
  %y.in = icmp ult i64 %y.from, %length
  %in = or i1 %x.in, %y.in
  %k2 = add i64 %k, 1
  br i1 %in, label %end, label %look
private:
  %thread = call ptr @PyEval_SaveThread()
  br label %chunk
chunk:
  %c = phi i64 [ 0, %private ], [ %c2, %met ]
  %undone = icmp ult i64 %c, %number.of
  br i1 %undone, label %next, label %done
next:
  %last = load i64, ptr %turn
  %number = add i64 %last, 1
  %slotted = icmp ugt i64 %slots, 1
  br i1 %slotted, label %slot, label %free
slot:
  %n1 = add i64 %number, 1
  %goal = sub i64 %n1, %slots
  %late = call i64 @dtrain_await(ptr %crew, i64 0, i64 %goal, i64 0, i64 0, i64 0)
  %left = icmp eq i64 %late, 0
  br i1 %left, label %free, label %done
free:
  store i64 %number, ptr %turn
  %record.byte = call i64 @dtrain_record_at(i64 %number)
  call void @dtrain_record(ptr %mine, i64 %record.byte, i64 %number, ptr %record.at)
  %at.home = icmp ne i64 %home, 0
  br i1 %at.home, label %aside, label %index
aside:
  %here = or i64 %x.data, {cross_memory.PRIVATE << 48}
  %aside.byte = add i64 %record.byte, {8 * ASIDE}
  %aside.at = getelementptr i8, ptr %mine, i64 %aside.byte
  store i64 %here, ptr %aside.at
  br label %index
index:
  %turns = urem i64 %number, %slots
  %row.words = add i64 %slots, 1
  %row = mul i64 %c, %row.words
  %row.at = getelementptr i64, ptr %chunks, i64 %row
  %from = load i64, ptr %row.at
  %job.word = add i64 %turns, 1
  %job.at = getelementptr i64, ptr %row.at, i64 %job.word
  %job = load ptr, ptr %job.at
  %aims.at = getelementptr i64, ptr %job, i64 {AIMS}
  %aims = load ptr, ptr %aims.at
  %aims.of.at = getelementptr i64, ptr %aims.at, i64 1
  %aims.of = load i64, ptr %aims.of.at
  br label %aim
aim:
  %a = phi i64 [ 0, %index ], [ %a2, %aimed ]
  %unaimed = icmp ult i64 %a, %aims.of
  br i1 %unaimed, label %aimed, label %meet
aimed:
  %aim.at = getelementptr [3 x i64], ptr %aims, i64 %a
  %word.at = load ptr, ptr %aim.at
  %of.at = getelementptr i64, ptr %aim.at, i64 1
  %of = load i64, ptr %of.at
  %plus.at = getelementptr i64, ptr %aim.at, i64 2
  %plus = load i64, ptr %plus.at
  %of.target = icmp ne i64 %of, 0
  %base = select i1 %of.target, i64 %y.data, i64 %x.data
  %offset = add i64 %from, %plus
  %value = add i64 %base, %offset
  store i64 %value, ptr %word.at
  %a2 = add i64 %a, 1
  br label %aim
meet:
  %found = call i64 @dtrain_meet(ptr %crew, ptr %mine, ptr %job, i64 %number, i64 %record.byte, i64 0, i64 0)
  %well = icmp eq i64 %found, 0
  br i1 %well, label %met, label %done
met:
  %c2 = add i64 %c, 1
  br label %chunk
done:
  %result = phi i64 [ 0, %chunk ], [ {NOT_FREE}, %slot ], [ %found, %meet ]
  store i64 %c, ptr %reached.at
  call void @PyEval_RestoreThread(ptr %thread)
  br label %end
end:
  %code = phi i64 [ {UNLIKE}, %entry ], [ {UNLIKE}, %begin ], [ {UNLIKE}, %range ],
    [ {UNLIKE}, %known ], [ %result, %done ]
  %object = call ptr @PyLong_FromLong(i64 %code)
  ret ptr %object
}}
"""
