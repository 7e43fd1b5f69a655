"""The text of the short calls of `machine_code.py`, in LLVM's language: a whole collective of `small.py`.

    number, record -> is my slot free? -> give -> raise -> wait -> take

Python calls `dtrain_short` as one of its own functions (METH_FASTCALL), for a fifth of what a call through ctypes
takes. So it gets Python objects, NumPy arrays, and reads their structs (`PyArrayObject_fields`, which is public;
`machine_code.py` looks whether they are as here). While it waits for long, the GIL is free.

It never waits for ever: it returns what hinders it, and goes on from there when it is called with a third argument.
"""

from dtrain.collectives.machine_source import loaded
from dtrain.collectives.records import RECORD_WORDS, RECORDS, RING, SIGNATURE

HEAD = object.__basicsize__  # bytes of a Python object before what is its own
TYPE, DATA, DIMS, SHAPE, DTYPE, FLAGS = (HEAD + byte for byte in (-8, 0, 8, 16, 40, 48))  # bytes of an array

# What a call returns: 0, or the number of a rank of the crew that came to something else, from 1 on, or
LATE, NOT_FREE, UNLIKE, ANOTHER = -1, -2, -3, -4
# The third argument: the slot was not free; somebody was late.
AGAIN, WAIT = 1, 2

# The words of a job, and what the machine code takes them for. `record` and those after it: all but its number.
JOB = {
    "crew": "ptr",  # whom to wait for, or nobody (0)
    "all": "ptr",  # the crew of all peers
    "mine": "ptr",  # my words
    "turn": "ptr",  # number of the last collective; one to which all had come when this was last looked at
    "source": "ptr",  # what the first array must be like: see dtrain_like
    "target": "ptr",  # what the second array must be like
    "slot": "ptr",  # my first one
    "depth": "i64",  # how many there are
    "stride": "i64",  # bytes from one to the next
    "give": "ptr",  # rows of dtrain_copies, from the first array into my slot
    "gives": "i64",  # how many
    "head": "ptr",  # what must stand at the beginning of the slot of root, if anything must (0); else it is ANOTHER
    "heads": "i64",  # words of it
    "root": "ptr",  # the first slot of root
    "take": "ptr",  # rows of dtrain_copies, from the first slots into the second array
    "takes": "i64",
    "sum": "ptr",  # a function that adds up slots into the second array, or none (0)
    "terms": "ptr",  # where the terms lie in the first slots
    "ranks": "i64",  # how many there are
    "bytes": "i64",  # of each
    "places": "ptr",  # room for as many addresses
    "record": "i64",
}
WORD = {name: word for word, name in enumerate(JOB)}
WORDS = len(JOB) - 1 + RECORD_WORDS - 1


def short() -> str:
    """All functions."""
    return _ARRAYS + _RECORD + _SHORT.replace("LOADS", loaded(JOB, "job"))


_ARRAYS = f"""
; An array is as it must be: {{type, dtype, flags that must be set, dims, length, length, ...}}.
define i1 @dtrain_like(ptr %array, ptr %form) {{
entry:
  %type.at = getelementptr i8, ptr %array, i64 {TYPE}
  %type = load i64, ptr %type.at
  %type.must = load i64, ptr %form
  %typed = icmp eq i64 %type, %type.must
  br i1 %typed, label %array.too, label %no
array.too:
  %dtype.at = getelementptr i8, ptr %array, i64 {DTYPE}
  %dtype = load i64, ptr %dtype.at
  %dtype.form = getelementptr i64, ptr %form, i64 1
  %dtype.must = load i64, ptr %dtype.form
  %flags.at = getelementptr i8, ptr %array, i64 {FLAGS}
  %flags32 = load i32, ptr %flags.at
  %flags = zext i32 %flags32 to i64
  %flags.form = getelementptr i64, ptr %form, i64 2
  %flags.must = load i64, ptr %flags.form
  %flags.set = and i64 %flags, %flags.must
  %dims.at = getelementptr i8, ptr %array, i64 {DIMS}
  %dims32 = load i32, ptr %dims.at
  %dims = zext i32 %dims32 to i64
  %dims.form = getelementptr i64, ptr %form, i64 3
  %dims.must = load i64, ptr %dims.form
  %like1 = icmp eq i64 %dtype, %dtype.must
  %like2 = icmp eq i64 %flags.set, %flags.must
  %like3 = icmp eq i64 %dims, %dims.must
  %like12 = and i1 %like1, %like2
  %like = and i1 %like12, %like3
  br i1 %like, label %lengths, label %no
lengths:
  %shape.at = getelementptr i8, ptr %array, i64 {SHAPE}
  %shape = load ptr, ptr %shape.at
  %shape.must = getelementptr i64, ptr %form, i64 4
  br label %look
look:
  %k = phi i64 [ 0, %lengths ], [ %k2, %one ]
  %more = icmp ult i64 %k, %dims
  br i1 %more, label %one, label %yes
one:
  %length.at = getelementptr i64, ptr %shape, i64 %k
  %length = load i64, ptr %length.at
  %length.form = getelementptr i64, ptr %shape.must, i64 %k
  %length.must = load i64, ptr %length.form
  %k2 = add i64 %k, 1
  %same = icmp eq i64 %length, %length.must
  br i1 %same, label %look, label %no
yes:
  ret i1 true
no:
  ret i1 false
}}

; The first two arguments are arrays as they must be.
define i1 @dtrain_both(ptr %arguments, ptr %source, ptr %target) {{
entry:
  %x = load ptr, ptr %arguments
  %y.at = getelementptr ptr, ptr %arguments, i64 1
  %y = load ptr, ptr %y.at
  %x.like = call i1 @dtrain_like(ptr %x, ptr %source)
  %y.like = call i1 @dtrain_like(ptr %y, ptr %target)
  %like = and i1 %x.like, %y.like
  ret i1 %like
}}

; Where the data of argument k, an array, lie.
define i64 @dtrain_data(ptr %arguments, i64 %k) {{
entry:
  %at = getelementptr ptr, ptr %arguments, i64 %k
  %array = load ptr, ptr %at
  %data.at = getelementptr i8, ptr %array, i64 {DATA}
  %data = load i64, ptr %data.at
  ret i64 %data
}}
"""

_RECORD = f"""
; The byte among my words where the record of a number stands.
define i64 @dtrain_record_at(i64 %number) {{
entry:
  %ring = urem i64 %number, {RING}
  %bytes = mul i64 %ring, {8 * RECORD_WORDS}
  %byte = add i64 %bytes, {8 * RECORDS}
  ret i64 %byte
}}

; Write the record of a number, all but which lies at %record.
define void @dtrain_record(ptr %mine, i64 %byte, i64 %number, ptr %record) {{
entry:
  %r0 = getelementptr i8, ptr %mine, i64 %byte
  store i64 %number, ptr %r0
  %r1 = getelementptr i64, ptr %r0, i64 1
  call void @llvm.memcpy.p0.p0.i64(ptr %r1, ptr %record, i64 {8 * (RECORD_WORDS - 1)}, i1 false)
  ret void
}}
"""

_SHORT = f"""
declare ptr @PyLong_FromLong(i64)
declare i64 @PyLong_AsLong(ptr)
declare ptr @PyEval_SaveThread()
declare void @PyEval_RestoreThread(ptr)

define ptr @dtrain_short(ptr %self, ptr %arguments, i64 %given) {{
entry:
  %result = alloca ptr
  %job.at = getelementptr i8, ptr %self, i64 {DATA}
  %job = load ptr, ptr %job.at
LOADS
  %like = call i1 @dtrain_both(ptr %arguments, ptr %source, ptr %target)
  br i1 %like, label %begin, label %end
begin:
  %x.address = call i64 @dtrain_data(ptr %arguments, i64 0)
  %x.data = inttoptr i64 %x.address to ptr
  %y.address = call i64 @dtrain_data(ptr %arguments, i64 1)
  %y.data = inttoptr i64 %y.address to ptr
  %last = load i64, ptr %turn
  %anew = icmp eq i64 %given, 2
  br i1 %anew, label %fresh, label %resumed
fresh:
  %next = add i64 %last, 1
  store i64 %next, ptr %turn
  br label %numbered
resumed:
  %stage.at = getelementptr ptr, ptr %arguments, i64 2
  %stage.object = load ptr, ptr %stage.at
  %stage.given = call i64 @PyLong_AsLong(ptr %stage.object)
  br label %numbered
numbered:
  %number = phi i64 [ %next, %fresh ], [ %last, %resumed ]
  %stage = phi i64 [ 0, %fresh ], [ %stage.given, %resumed ]
  %index = urem i64 %number, %depth
  %shift = mul i64 %index, %stride
  %record.byte = call i64 @dtrain_record_at(i64 %number)
  %waits = icmp eq i64 %stage, {WAIT}
  br i1 %waits, label %wait, label %write
write:
  call void @dtrain_record(ptr %mine, i64 %record.byte, i64 %number, ptr %record.at)
  %come.at = getelementptr i64, ptr %turn, i64 1
  %come = load i64, ptr %come.at
  %before = sub i64 %number, %depth
  %known = icmp sgt i64 %come, %before
  br i1 %known, label %free, label %look
look:
  %least = call i64 @dtrain_least(ptr %all, i64 0)
  store i64 %least, ptr %come.at
  %left = icmp sgt i64 %least, %before
  br i1 %left, label %free, label %end
free:
  %room = getelementptr i8, ptr %slot, i64 %shift
  %given0 = call i64 @dtrain_copies(ptr %give, i64 %gives, ptr %room, ptr %x.data, i64 0, i64 0)
  %raised = call i64 @dtrain_raise(ptr %all, ptr %mine, i64 0, i64 %number)
  br label %wait
wait:
  %nobody = icmp eq ptr %crew, null
  br i1 %nobody, label %took, label %somebody
somebody:
  %sign = add i64 %record.byte, {8 * SIGNATURE}
  %signature = load i64, ptr %record.at
  %first = call i64 @dtrain_least(ptr %crew, i64 0)
  %there = icmp sge i64 %first, %number
  br i1 %there, label %compare, label %absent
absent:
  %thread = call ptr @PyEval_SaveThread()
  %found1 = call i64 @dtrain_await(ptr %crew, i64 0, i64 %number, i64 %sign, i64 %signature, i64 0)
  call void @PyEval_RestoreThread(ptr %thread)
  br label %found
compare:
  %found2 = call i64 @dtrain_await(ptr %crew, i64 0, i64 %number, i64 %sign, i64 %signature, i64 0)
  br label %found
found:
  %other = phi i64 [ %found1, %absent ], [ %found2, %compare ]
  %well = icmp eq i64 %other, 0
  br i1 %well, label %took, label %end
took:
  %headless = icmp eq ptr %head, null
  br i1 %headless, label %rows, label %read
read:
  %root.slot = getelementptr i8, ptr %root, i64 %shift
  br label %word
word:
  %w = phi i64 [ 0, %read ], [ %w2, %one ]
  %unread = icmp ult i64 %w, %heads
  br i1 %unread, label %one, label %rows
one:
  %there.at = getelementptr i64, ptr %root.slot, i64 %w
  %there.word = load i64, ptr %there.at
  %head.at2 = getelementptr i64, ptr %head, i64 %w
  %head.word = load i64, ptr %head.at2
  %w2 = add i64 %w, 1
  %same = icmp eq i64 %there.word, %head.word
  br i1 %same, label %word, label %end
rows:
  %taken = call i64 @dtrain_copies(ptr %take, i64 %takes, ptr %y.data, ptr null, i64 0, i64 %shift)
  %unsummed = icmp eq ptr %sum, null
  br i1 %unsummed, label %end, label %place
place:
  %k = phi i64 [ 0, %rows ], [ %k2, %placed ]
  %more = icmp ult i64 %k, %ranks
  br i1 %more, label %placed, label %add
placed:
  %term.at = getelementptr i64, ptr %terms, i64 %k
  %term = load i64, ptr %term.at
  %place.at = getelementptr i64, ptr %places, i64 %k
  %term.here = add i64 %term, %shift
  store i64 %term.here, ptr %place.at
  %k2 = add i64 %k, 1
  br label %place
add:
  store ptr %y.data, ptr %result
  %added = call i64 %sum(ptr %places, i64 %ranks, ptr %result, i64 1, i64 %bytes, i64 0)
  br label %end
end:
  %code = phi i64 [ {UNLIKE}, %entry ], [ {NOT_FREE}, %look ], [ %other, %found ], [ {ANOTHER}, %one ],
    [ 0, %rows ], [ 0, %add ]
  %object = call ptr @PyLong_FromLong(i64 %code)
  ret ptr %object
}}
"""
