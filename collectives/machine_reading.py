"""The text of the reading of `machine_code.py`, in LLVM's language: blocks out of the memory of other processes and
into it.

The kernel copies by x86's string instruction, which is slow where the target lies 1 to 63 bytes after the source modulo
a page (`copying.py`). Such blocks go in pieces through a buffer that lies as the other process's memory does, and from
there by vectors: an all_to_all of 1 MiB between 2 ranks takes 77 us instead of 340.
"""

from dtrain.collectives.cross_memory import PIECE
from dtrain.collectives.machine_source import LINE, PAGE, loaded

DONE = 5  # the word of a row of `dtrain_trades` that says how many bytes of it are done, as long as not all rows are


def reading(process_vm_readv: int) -> str:
    """The functions; process_vm_readv: the number of the system call. That of process_vm_writev comes after it."""
    text = _READS + _TRADES
    return text.replace("READ", str(process_vm_readv)).replace("WRITE", str(process_vm_readv + 1))


_ROW = loaded(dict.fromkeys(("process", "there", "from", "to", "bytes"), "i64"), "r")
# A buffer, and of each process one block: address and bytes, as the system calls want them.
_ROOM = f"""  %room = alloca [{PIECE + PAGE} x i8], align {PAGE}
  %room.at = ptrtoint ptr %room to i64
  %here = alloca [2 x i64]
  %far = alloca [2 x i64]
  %here1 = getelementptr i64, ptr %here, i64 1
  %far1 = getelementptr i64, ptr %far, i64 1"""

# Rows of five words: process (0: this one), address of the source (0: my own), where it begins there, where in the
# target, bytes. Where the process is negative, the target is copied over the source, of its opposite. Returns the
# number of the first row that failed, from 1, or 0. A call may move less than it was asked.
_READS = f"""
define i64 @dtrain_reads(ptr %table, i64 %rows, ptr %target, ptr %own, i64 %past, i64 %nothing) {{
entry:
{_ROOM}
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %near ], [ %k2, %reading ]
  %more = icmp ult i64 %k, %rows
  br i1 %more, label %row, label %end
row:
  %k2 = add i64 %k, 1
  %r = getelementptr [5 x i64], ptr %table, i64 %k
{_ROW}
  %y = getelementptr i8, ptr %target, i64 %to
  %this = icmp eq i64 %process, 0
  br i1 %this, label %near, label %begin
near:
  %mine = icmp eq i64 %there, 0
  %there.p = inttoptr i64 %there to ptr
  %base = select i1 %mine, ptr %own, ptr %there.p
  %x = getelementptr i8, ptr %base, i64 %from
  %copied = call i64 @dtrain_copy(ptr %y, ptr %x, i64 %bytes, i64 %past)
  br label %look
begin:
  %writes = icmp slt i64 %process, 0
  %opposite = sub i64 0, %process
  %other = select i1 %writes, i64 %opposite, i64 %process
  %call = select i1 %writes, i64 WRITE, i64 READ
  %start = add i64 %there, %from
  %goal = ptrtoint ptr %y to i64
  %behind = sub i64 %goal, %start
  %before = sub i64 %start, %goal
  %gap = select i1 %writes, i64 %before, i64 %behind
  %gap.page = and i64 %gap, {PAGE - 1}
  %gap.less = sub i64 %gap.page, 1
  %slow = icmp ult i64 %gap.less, {LINE - 1}
  %gives = and i1 %slow, %writes
  %direct = xor i1 %writes, true
  %takes = and i1 %slow, %direct
  br label %reading
reading:
  %done = phi i64 [ 0, %begin ], [ %done2, %next ]
  %left = sub i64 %bytes, %done
  %ready = icmp eq i64 %left, 0
  br i1 %ready, label %look, label %ask
ask:
  %h = add i64 %goal, %done
  %f = add i64 %start, %done
  %skew = and i64 %f, {PAGE - 1}
  %b = add i64 %room.at, %skew
  %many = icmp ugt i64 %left, {PIECE}
  %cut = and i1 %slow, %many
  %part = select i1 %cut, i64 {PIECE}, i64 %left
  %h.now = select i1 %slow, i64 %b, i64 %h
  %h.p = inttoptr i64 %h to ptr
  %b.p = inttoptr i64 %b to ptr
  store i64 %h.now, ptr %here
  store i64 %part, ptr %here1
  store i64 %f, ptr %far
  store i64 %part, ptr %far1
  br i1 %gives, label %give, label %move
give:
  %given = call i64 @dtrain_copy(ptr %b.p, ptr %h.p, i64 %part, i64 0)
  br label %move
move:
  %moved = call i64 (i64, ...) @syscall(i64 %call, i64 %other, ptr %here, i64 1, ptr %far, i64 1, i64 0)
  %good = icmp sgt i64 %moved, 0
  br i1 %good, label %read, label %failed
read:
  %done2 = add i64 %done, %moved
  br i1 %takes, label %take, label %next
take:
  %taken = call i64 @dtrain_copy(ptr %h.p, ptr %b.p, i64 %moved, i64 0)
  br label %next
next:
  br label %reading
failed:
  ret i64 %k2
end:
  ret i64 0
}}"""

# Rows of six words: process (0: this one), address of an array, where it begins there, where in the target, bytes, and
# how many of them are done; both change places there. A piece is read into the buffer, which lies as the other array
# does, changes places with mine there, and is written back; what cannot be written is undone. Returns the number of the
# first row that failed, from 1; whoever begins again goes on from there. Or 0: then the rows are as at the beginning.
_TRADES = f"""
define i64 @dtrain_trades(ptr %table, i64 %rows, ptr %target, i64 %p, i64 %q, i64 %s) {{
entry:
{_ROOM}
  %swap = alloca [4 x i64]
  %swap1 = getelementptr i64, ptr %swap, i64 1
  %swap2 = getelementptr i64, ptr %swap, i64 2
  %swap3 = getelementptr i64, ptr %swap, i64 3
  store i64 0, ptr %swap1
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %piece ], [ %k2, %near ]
  %more = icmp ult i64 %k, %rows
  br i1 %more, label %row, label %clear
row:
  %k2 = add i64 %k, 1
  %r = getelementptr [6 x i64], ptr %table, i64 %k
{_ROW}
  %dp = getelementptr i64, ptr %r, i64 {DONE}
  %start = add i64 %there, %from
  br label %piece
piece:
  %done = load i64, ptr %dp
  %left = sub i64 %bytes, %done
  %ready = icmp eq i64 %left, 0
  br i1 %ready, label %look, label %where
where:
  %this = icmp eq i64 %process, 0
  br i1 %this, label %near, label %read
near:
  %swapped = call i64 @dtrain_swaps(ptr %there.at, i64 1, ptr %target, i64 0, i64 0, i64 0)
  store i64 %bytes, ptr %dp
  br label %look
read:
  %f = add i64 %start, %done
  %skew = and i64 %f, {PAGE - 1}
  %b = add i64 %room.at, %skew
  %many = icmp ugt i64 %left, {PIECE}
  %part = select i1 %many, i64 {PIECE}, i64 %left
  store i64 %b, ptr %here
  store i64 %part, ptr %here1
  store i64 %f, ptr %far
  store i64 %part, ptr %far1
  %got = call i64 (i64, ...) @syscall(i64 READ, i64 %process, ptr %here, i64 1, ptr %far, i64 1, i64 0)
  %came = icmp sgt i64 %got, 0
  br i1 %came, label %write, label %failed
write:
  %mine = add i64 %to, %done
  store i64 %b, ptr %swap
  store i64 %mine, ptr %swap2
  store i64 %got, ptr %swap3
  %given = call i64 @dtrain_swaps(ptr %swap, i64 1, ptr %target, i64 0, i64 0, i64 0)
  store i64 %got, ptr %here1
  store i64 %got, ptr %far1
  %put = call i64 (i64, ...) @syscall(i64 WRITE, i64 %process, ptr %here, i64 1, ptr %far, i64 1, i64 0)
  %some = icmp sgt i64 %put, 0
  %went = select i1 %some, i64 %put, i64 0
  %done2 = add i64 %done, %went
  store i64 %done2, ptr %dp
  %all = icmp eq i64 %went, %got
  br i1 %all, label %piece, label %undo
undo:
  %b2 = add i64 %b, %went
  %mine2 = add i64 %mine, %went
  %back = sub i64 %got, %went
  store i64 %b2, ptr %swap
  store i64 %mine2, ptr %swap2
  store i64 %back, ptr %swap3
  %undone = call i64 @dtrain_swaps(ptr %swap, i64 1, ptr %target, i64 0, i64 0, i64 0)
  br i1 %some, label %piece, label %failed
failed:
  ret i64 %k2
clear:
  %j = phi i64 [ 0, %look ], [ %j2, %one ]
  %stale = icmp ult i64 %j, %rows
  br i1 %stale, label %one, label %end
one:
  %cp = getelementptr [6 x i64], ptr %table, i64 %j, i64 {DONE}
  store i64 0, ptr %cp
  %j2 = add i64 %j, 1
  br label %clear
end:
  ret i64 0
}}"""
