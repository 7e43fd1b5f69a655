"""The text of the waiting of `machine_code.py`, in LLVM's language: raise a flag, await flags, a whole meeting.

Invariant of raise and await: no wake-up is lost. The sleeper counts itself, notes the bell, looks at the flags, and
sleeps only if the bell is as noted; who raises a flag looks at the count afterwards (all sequentially consistent), so
one of the two sees the other. Who lifts the smallest of all flags rings: nobody else can end a wait for all.

    meet    before -> ARRIVED -> wait -> are the places as expected? -> among -> REDUCED -> wait -> after

A meeting never waits for ever: it gives up with a number below zero, and goes on at the stage it is told.
"""

import platform

from dtrain.collectives.records import ASIDE, SIGNATURE
from dtrain.collectives.waiting import REDUCED


def waiting(futex: int) -> str:
    """All functions; futex: the number of the system call."""
    pause = "call void @llvm.x86.sse2.pause()" if platform.machine() == "x86_64" else ""
    declared = "declare void @llvm.x86.sse2.pause()" if pause else ""
    meeting = _MEETING
    for name, word in (("SIGNATURE", SIGNATURE), ("ASIDE", ASIDE), ("REDUCED", REDUCED)):
        meeting = meeting.replace(name, str(8 * word))
    return "\n".join([_WAITING.replace("FUTEX", str(futex)).replace("PAUSE", pause), meeting, declared])


# A crew is { ranks, bell, spins, yields, words of the first, words of the second, ... }, the bell { i32 rung, i32, i64
# asleep }.
_WAITING = """
%Crew = type { i64, ptr, i64, i64, [0 x ptr] }
declare i64 @syscall(i64, ...)
declare i32 @sched_yield()

define i64 @dtrain_least(ptr %crew, i64 %offset) {
entry:
  %p = load i64, ptr %crew
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %one ]
  %least = phi i64 [ 9223372036854775807, %entry ], [ %least2, %one ]
  %more = icmp ult i64 %k, %p
  br i1 %more, label %one, label %end
one:
  %ak = getelementptr %Crew, ptr %crew, i64 0, i32 4, i64 %k
  %words = load ptr, ptr %ak
  %at = getelementptr i8, ptr %words, i64 %offset
  %flag = load atomic i64, ptr %at seq_cst, align 8
  %less = icmp slt i64 %flag, %least
  %least2 = select i1 %less, i64 %flag, i64 %least
  %k2 = add i64 %k, 1
  br label %look
end:
  ret i64 %least
}

define i64 @dtrain_raise(ptr %crew, ptr %mine, i64 %offset, i64 %number) {
entry:
  %old = atomicrmw xchg ptr %mine, i64 %number seq_cst
  %bp = getelementptr %Crew, ptr %crew, i64 0, i32 1
  %bell = load ptr, ptr %bp
  %sp = getelementptr i8, ptr %bell, i64 8
  %asleep = load atomic i64, ptr %sp seq_cst, align 8
  %nobody = icmp eq i64 %asleep, 0
  br i1 %nobody, label %end, label %check
check:
  %least = call i64 @dtrain_least(ptr %crew, i64 %offset)
  %last = icmp sgt i64 %least, %old
  br i1 %last, label %ring, label %end
ring:
  %rung = atomicrmw add ptr %bell, i32 1 seq_cst
  %woken = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %bell, i64 1, i64 2147483647, i64 0, i64 0, i64 0)
  br label %end
end:
  ret i64 0
}

define i64 @dtrain_await(ptr %crew, i64 %offset, i64 %goal, i64 %slot, i64 %signature, i64 %nanoseconds) {
entry:
  %time = alloca { i64, i64 }
  %p = load i64, ptr %crew
  %bp = getelementptr %Crew, ptr %crew, i64 0, i32 1
  %bell = load ptr, ptr %bp
  %sp = getelementptr i8, ptr %bell, i64 8
  %np = getelementptr %Crew, ptr %crew, i64 0, i32 2
  %spins = load i64, ptr %np
  %yp = getelementptr %Crew, ptr %crew, i64 0, i32 3
  %yields = load i64, ptr %yp
  %tries = add i64 %spins, %yields
  br label %look
look:
  %t = phi i64 [ 0, %entry ], [ %t2, %spin ], [ %t2, %yield ]
  %least = call i64 @dtrain_least(ptr %crew, i64 %offset)
  %there = icmp sge i64 %least, %goal
  br i1 %there, label %come, label %absent
absent:
  %t2 = add i64 %t, 1
  %spinning = icmp ule i64 %t2, %spins
  br i1 %spinning, label %spin, label %maybe
spin:
  PAUSE
  br label %look
maybe:
  %yielding = icmp ule i64 %t2, %tries
  br i1 %yielding, label %yield, label %tired
yield:
  %y = call i32 @sched_yield()
  br label %look
tired:
  %short = icmp eq i64 %nanoseconds, 0
  br i1 %short, label %notyet, label %count
count:
  %s1 = atomicrmw add ptr %sp, i64 1 seq_cst
  %rung = load atomic i32, ptr %bell seq_cst, align 4
  %least2 = call i64 @dtrain_least(ptr %crew, i64 %offset)
  %there2 = icmp sge i64 %least2, %goal
  br i1 %there2, label %awake, label %sleep
sleep:
  %full = udiv i64 %nanoseconds, 1000000000
  %rest = urem i64 %nanoseconds, 1000000000
  store i64 %full, ptr %time
  %tn = getelementptr i8, ptr %time, i64 8
  store i64 %rest, ptr %tn
  %expected = zext i32 %rung to i64
  %slept = call i64 (i64, ...) @syscall(i64 FUTEX, ptr %bell, i64 0, i64 %expected, ptr %time, i64 0, i64 0)
  br label %awake
awake:
  %s2 = atomicrmw sub ptr %sp, i64 1 seq_cst
  %least3 = call i64 @dtrain_least(ptr %crew, i64 %offset)
  %there3 = icmp sge i64 %least3, %goal
  br i1 %there3, label %come, label %notyet
notyet:
  ret i64 -1
come:
  %unsigned = icmp eq i64 %slot, 0
  br i1 %unsigned, label %well, label %compare
compare:
  %k = phi i64 [ 0, %come ], [ %k2, %alike ]
  %more = icmp ult i64 %k, %p
  br i1 %more, label %one, label %well
one:
  %ak = getelementptr %Crew, ptr %crew, i64 0, i32 4, i64 %k
  %words = load ptr, ptr %ak
  %at = getelementptr i8, ptr %words, i64 %slot
  %theirs = load i64, ptr %at
  %k2 = add i64 %k, 1
  %same = icmp eq i64 %theirs, %signature
  br i1 %same, label %alike, label %other
alike:
  br label %compare
other:
  ret i64 %k2
well:
  ret i64 0
}"""

# The words of a job stand in `meeting.py`.
_MEETING = """
define i64 @dtrain_differ(ptr %crew, i64 %slot, ptr %expected) {
entry:
  %none = icmp eq ptr %expected, null
  %p0 = load i64, ptr %crew
  %p = select i1 %none, i64 0, i64 %p0
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %one ]
  %more = icmp ult i64 %k, %p
  br i1 %more, label %one, label %same
one:
  %ak = getelementptr %Crew, ptr %crew, i64 0, i32 4, i64 %k
  %words = load ptr, ptr %ak
  %at = getelementptr i8, ptr %words, i64 %slot
  %there = load i64, ptr %at
  %ek = getelementptr i64, ptr %expected, i64 %k
  %e = load i64, ptr %ek
  %k2 = add i64 %k, 1
  %like = icmp eq i64 %there, %e
  br i1 %like, label %look, label %other
same:
  ret i64 0
other:
  ret i64 1
}

define i64 @dtrain_meet(ptr %crew, ptr %mine, ptr %job, i64 %number, i64 %record, i64 %stage, i64 %nanoseconds) {
entry:
  switch i64 %stage, label %before [ i64 1, label %look
                                     i64 2, label %after ]
before:
  %d1 = call i64 @dtrain_do(ptr %job, i64 0)
  %r1 = call i64 @dtrain_raise(ptr %crew, ptr %mine, i64 0, i64 %number)
  %slot = add i64 %record, SIGNATURE
  %sp = getelementptr i8, ptr %mine, i64 %slot
  %signature = load i64, ptr %sp
  %w1 = call i64 @dtrain_await(ptr %crew, i64 0, i64 %number, i64 %slot, i64 %signature, i64 %nanoseconds)
  %come = icmp eq i64 %w1, 0
  br i1 %come, label %look, label %notcome
notcome:
  ret i64 %w1
look:
  %ep = getelementptr i64, ptr %job, i64 22
  %expected = load ptr, ptr %ep
  %places = add i64 %record, ASIDE
  %differ = call i64 @dtrain_differ(ptr %crew, i64 %places, ptr %expected)
  %known = icmp eq i64 %differ, 0
  br i1 %known, label %among, label %unknown
unknown:
  ret i64 -2
among:
  %d2 = call i64 @dtrain_do(ptr %job, i64 7)
  %well = icmp eq i64 %d2, 0
  br i1 %well, label %goon, label %failed
failed:
  ret i64 -4
goon:
  %tp = getelementptr i64, ptr %job, i64 21
  %two = load i64, ptr %tp
  %once = icmp eq i64 %two, 0
  br i1 %once, label %end, label %again
again:
  %rp = getelementptr i8, ptr %mine, i64 REDUCED
  %r2 = call i64 @dtrain_raise(ptr %crew, ptr %rp, i64 REDUCED, i64 %number)
  %w2 = call i64 @dtrain_await(ptr %crew, i64 REDUCED, i64 %number, i64 0, i64 0, i64 %nanoseconds)
  %done = icmp eq i64 %w2, 0
  br i1 %done, label %after, label %notdone
notdone:
  ret i64 -3
after:
  %d3 = call i64 @dtrain_do(ptr %job, i64 14)
  br label %end
end:
  ret i64 0
}"""
