"""The text of the reading of `machine_code.py`, in LLVM's language: blocks out of the memory of other processes and
into it.
"""


def reading(process_vm_readv: int) -> str:
    """The function; process_vm_readv: the number of the system call. That of process_vm_writev comes after it."""
    return _READS.replace("READ", str(process_vm_readv)).replace("WRITE", str(process_vm_readv + 1))


# Rows of five words: process (0: this one), address of the source (0: my own), where it begins there, where in the
# target, bytes. Where the process is negative, the target is copied over the source, of its opposite. Returns the
# number of the first row that failed, from 1, or 0. A call may move less than it was asked.
_READS = """
define i64 @dtrain_reads(ptr %table, i64 %rows, ptr %target, ptr %own, i64 %past, i64 %nothing) {
entry:
  %here = alloca [2 x i64]
  %far = alloca [2 x i64]
  %here1 = getelementptr i64, ptr %here, i64 1
  %far1 = getelementptr i64, ptr %far, i64 1
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %near ], [ %k2, %reading ]
  %more = icmp ult i64 %k, %rows
  br i1 %more, label %row, label %end
row:
  %k2 = add i64 %k, 1
  %r = getelementptr [5 x i64], ptr %table, i64 %k
  %process = load i64, ptr %r
  %ap = getelementptr i64, ptr %r, i64 1
  %there = load i64, ptr %ap
  %fp = getelementptr i64, ptr %r, i64 2
  %from = load i64, ptr %fp
  %tp = getelementptr i64, ptr %r, i64 3
  %to = load i64, ptr %tp
  %bp = getelementptr i64, ptr %r, i64 4
  %bytes = load i64, ptr %bp
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
  br label %reading
reading:
  %done = phi i64 [ 0, %begin ], [ %done2, %read ]
  %left = sub i64 %bytes, %done
  %ready = icmp eq i64 %left, 0
  br i1 %ready, label %look, label %ask
ask:
  %h = add i64 %goal, %done
  %f = add i64 %start, %done
  store i64 %h, ptr %here
  store i64 %left, ptr %here1
  store i64 %f, ptr %far
  store i64 %left, ptr %far1
  %moved = call i64 (i64, ...) @syscall(i64 %call, i64 %other, ptr %here, i64 1, ptr %far, i64 1, i64 0)
  %good = icmp sgt i64 %moved, 0
  br i1 %good, label %read, label %failed
read:
  %done2 = add i64 %done, %moved
  br label %reading
failed:
  ret i64 %k2
end:
  ret i64 0
}"""
