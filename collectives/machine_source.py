"""The text of the functions of `machine_code.py`, in LLVM's language.

Invariant of raise and await: no wake-up is lost. The sleeper counts itself, notes the bell, looks at the flags, and
sleeps only if the bell is as noted; who raises a flag looks at the count afterwards (all sequentially consistent), so
one of the two sees the other. Who lifts the smallest of all flags rings: nobody else can end a wait for all.
"""

import platform

STEP = 256  # bytes of each array in registers at once


def source(futex: int | None) -> str:
    """All functions; futex: the number of the system call, None: without those that need it."""
    parts = [_sum("float", 4), _sum("double", 8), _STREAM]
    if futex is not None:
        pause = "call void @llvm.x86.sse2.pause()" if platform.machine() == "x86_64" else ""
        parts.append(_WAITING.replace("FUTEX", str(futex)).replace("PAUSE", pause))
        if pause:
            parts.append("declare void @llvm.x86.sse2.pause()")
    return "\n".join([*parts, "!0 = !{i32 1}"])


def _sum(kind: str, item: int) -> str:
    """Three loops: STEP bytes at a time past the caches, STEP bytes at a time, single elements for the rest."""
    wide = f"<{STEP // item} x {kind}>"
    loops = [
        _sum_loop("s", wide, item, STEP, "%streamed", "store {0} %{1}.sum, ptr {2}, align 64, !nontemporal !0"),
        _sum_loop("w", wide, item, STEP, "%whole", "store {0} %{1}.sum, ptr {2}, align {3}"),
        _sum_loop("e", kind, item, item, "%bytes", "store {0} %{1}.sum, ptr {2}, align {3}"),
    ]
    return f"""
define i64 @dtrain_sum_{kind}(ptr %in, i64 %p, ptr %out, i64 %q, i64 %bytes, i64 %stream) {{
entry:
  %whole = and i64 %bytes, {-STEP}
  %past = icmp ne i64 %stream, 0
  %streamed = select i1 %past, i64 %whole, i64 0
  br label %s
{"".join(loops).replace("NEXT_s", "w").replace("NEXT_w", "e").replace("NEXT_e", "end")}
end:
  fence seq_cst
  ret i64 0
}}"""


def _sum_loop(n: str, vector: str, item: int, step: int, limit: str, store: str) -> str:
    """Elements from where the loop before has stopped up to `limit`."""
    before = {"s": "[ 0, %entry ]", "w": "[ %s.i, %s ]", "e": "[ %w.i, %w ]"}[n]
    return f"""
{n}:
  %{n}.i = phi i64 {before}, [ %{n}.i2, %{n}.done ]
  %{n}.more = icmp ult i64 %{n}.i, {limit}
  br i1 %{n}.more, label %{n}.first, label %NEXT_{n}
{n}.first:
  %{n}.a0 = load ptr, ptr %in
  %{n}.x0 = getelementptr i8, ptr %{n}.a0, i64 %{n}.i
  %{n}.v0 = load {vector}, ptr %{n}.x0, align {item}
  br label %{n}.add
{n}.add:
  %{n}.k = phi i64 [ 1, %{n}.first ], [ %{n}.k2, %{n}.one ]
  %{n}.sum = phi {vector} [ %{n}.v0, %{n}.first ], [ %{n}.sum2, %{n}.one ]
  %{n}.terms = icmp ult i64 %{n}.k, %p
  br i1 %{n}.terms, label %{n}.one, label %{n}.store
{n}.one:
  %{n}.ak = getelementptr ptr, ptr %in, i64 %{n}.k
  %{n}.a = load ptr, ptr %{n}.ak
  %{n}.x = getelementptr i8, ptr %{n}.a, i64 %{n}.i
  %{n}.v = load {vector}, ptr %{n}.x, align {item}
  %{n}.sum2 = fadd {vector} %{n}.sum, %{n}.v
  %{n}.k2 = add i64 %{n}.k, 1
  br label %{n}.add
{n}.store:
  %{n}.j = phi i64 [ 0, %{n}.add ], [ %{n}.j2, %{n}.put ]
  %{n}.results = icmp ult i64 %{n}.j, %q
  br i1 %{n}.results, label %{n}.put, label %{n}.done
{n}.put:
  %{n}.bj = getelementptr ptr, ptr %out, i64 %{n}.j
  %{n}.b = load ptr, ptr %{n}.bj
  %{n}.y = getelementptr i8, ptr %{n}.b, i64 %{n}.i
  {store.format(vector, n, f"%{n}.y", item)}
  %{n}.j2 = add i64 %{n}.j, 1
  br label %{n}.store
{n}.done:
  %{n}.i2 = add i64 %{n}.i, {step}
  br label %{n}"""


_STREAM = f"""
define i64 @dtrain_stream(ptr %target, ptr %source, i64 %bytes) {{
entry:
  br label %look
look:
  %i = phi i64 [ 0, %entry ], [ %i2, %body ]
  %more = icmp ult i64 %i, %bytes
  br i1 %more, label %body, label %end
body:
  %x = getelementptr i8, ptr %source, i64 %i
  %y = getelementptr i8, ptr %target, i64 %i
  %v = load <{STEP} x i8>, ptr %x, align 1
  store <{STEP} x i8> %v, ptr %y, align 64, !nontemporal !0
  %i2 = add i64 %i, {STEP}
  br label %look
end:
  fence seq_cst
  ret i64 0
}}"""

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
