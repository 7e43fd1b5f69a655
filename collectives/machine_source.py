"""The text of the loops of `machine_code.py`, in LLVM's language: sums, copies and swaps."""

from collections.abc import Mapping

STEP = 256  # bytes of each array in registers at once
LONG = 1 << 16  # bytes: below, a copy gains nothing past the caches
SHORT = 2048  # bytes: below, memcpy needs no string instruction
PAGE, LINE = 4096, 64


def loaded(words: Mapping[str, str], base: str) -> str:
    """The text that loads the words of what lies at %base, by name and kind; %name.at is where each lies."""
    lines = []
    for word, (name, kind) in enumerate(words.items()):
        lines += [
            f"  %{name}.at = getelementptr i64, ptr %{base}, i64 {word}",
            f"  %{name} = load {kind}, ptr %{name}.at",
        ]
    return "\n".join(lines)


_ROW = loaded({"there": "ptr", "from": "i64", "to": "i64", "bytes": "i64"}, "r")


def loops() -> str:
    """All functions."""
    return "\n".join([_sum("float", 4), _sum("double", 8), _COPY, _COPIES, _swaps(), _DO, "!0 = !{i32 1}"])


def _sum(kind: str, item: int) -> str:
    """Three loops: STEP bytes at a time, past the caches if every result begins a line; STEP bytes; single elements."""
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
  br label %places
places:
  %o = phi i64 [ 0, %entry ], [ %o2, %place ]
  %bits = phi i64 [ 0, %entry ], [ %bits2, %place ]
  %unseen = icmp ult i64 %o, %q
  br i1 %unseen, label %place, label %seen
place:
  %op = getelementptr i64, ptr %out, i64 %o
  %oa = load i64, ptr %op
  %bits2 = or i64 %bits, %oa
  %o2 = add i64 %o, 1
  br label %places
seen:
  %low = and i64 %bits, {LINE - 1}
  %aligned = icmp eq i64 %low, 0
  %wanted = icmp ne i64 %stream, 0
  %past = and i1 %wanted, %aligned
  %streamed = select i1 %past, i64 %whole, i64 0
  br label %s
{"".join(loops).replace("NEXT_s", "w").replace("NEXT_w", "e").replace("NEXT_e", "end")}
end:
  fence seq_cst
  ret i64 0
}}"""


def _sum_loop(n: str, vector: str, item: int, step: int, limit: str, store: str) -> str:
    """Elements from where the loop before has stopped up to `limit`."""
    before = {"s": "[ 0, %seen ]", "w": "[ %s.i, %s ]", "e": "[ %w.i, %w ]"}[n]
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


# Past the caches from the first whole line on; by vectors where memcpy's string instruction is slow (`copying.py`).
_COPY = f"""
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)

define i64 @dtrain_copy(ptr %target, ptr %source, i64 %bytes, i64 %past) {{
entry:
  %t = ptrtoint ptr %target to i64
  %s = ptrtoint ptr %source to i64
  %same = icmp eq i64 %t, %s
  br i1 %same, label %end, label %choose
choose:
  %wanted = icmp ne i64 %past, 0
  %long = icmp uge i64 %bytes, {LONG}
  %stream = and i1 %wanted, %long
  br i1 %stream, label %head, label %near
head:
  %negative = sub i64 0, %t
  %h = and i64 %negative, {LINE - 1}
  call void @llvm.memcpy.p0.p0.i64(ptr %target, ptr %source, i64 %h, i1 false)
  %room = sub i64 %bytes, %h
  %whole = and i64 %room, {-STEP}
  %stop = add i64 %h, %whole
  br label %past.look
past.look:
  %i = phi i64 [ %h, %head ], [ %i2, %past.body ]
  %more = icmp ult i64 %i, %stop
  br i1 %more, label %past.body, label %past.end
past.body:
  %x = getelementptr i8, ptr %source, i64 %i
  %y = getelementptr i8, ptr %target, i64 %i
  %v = load <{STEP} x i8>, ptr %x, align 1
  store <{STEP} x i8> %v, ptr %y, align {LINE}, !nontemporal !0
  %i2 = add i64 %i, {STEP}
  br label %past.look
past.end:
  fence seq_cst
  br label %rest
near:
  %d = sub i64 %t, %s
  %m = and i64 %d, {PAGE - 1}
  %m1 = sub i64 %m, 1
  %close = icmp ult i64 %m1, {LINE - 1}
  %big = icmp ugt i64 %bytes, {SHORT}
  %slow = and i1 %close, %big
  %all = and i64 %bytes, {-STEP}
  %limit = select i1 %slow, i64 %all, i64 0
  br label %near.look
near.look:
  %j = phi i64 [ 0, %near ], [ %j2, %near.body ]
  %more2 = icmp ult i64 %j, %limit
  br i1 %more2, label %near.body, label %rest
near.body:
  %x2 = getelementptr i8, ptr %source, i64 %j
  %y2 = getelementptr i8, ptr %target, i64 %j
  %v2 = load <{STEP} x i8>, ptr %x2, align 1
  store <{STEP} x i8> %v2, ptr %y2, align 1
  %j2 = add i64 %j, {STEP}
  br label %near.look
rest:
  %done = phi i64 [ %stop, %past.end ], [ %j, %near.look ]
  %left = sub i64 %bytes, %done
  %x3 = getelementptr i8, ptr %source, i64 %done
  %y3 = getelementptr i8, ptr %target, i64 %done
  call void @llvm.memcpy.p0.p0.i64(ptr %y3, ptr %x3, i64 %left, i1 false)
  br label %end
end:
  ret i64 0
}}"""

# Rows of four words: address of the source (0: my own), where it begins there, where in the target, bytes. The others
# lie `shift` bytes after their addresses.
_COPIES = f"""
define i64 @dtrain_copies(ptr %table, i64 %rows, ptr %target, ptr %own, i64 %past, i64 %shift) {{
entry:
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %copy ]
  %more = icmp ult i64 %k, %rows
  br i1 %more, label %row, label %end
row:
  %r = getelementptr [4 x i64], ptr %table, i64 %k
{_ROW}
  %mine = icmp eq ptr %there, null
  %there.now = getelementptr i8, ptr %there, i64 %shift
  %base = select i1 %mine, ptr %own, ptr %there.now
  br label %copy
copy:
  %x = getelementptr i8, ptr %base, i64 %from
  %y = getelementptr i8, ptr %target, i64 %to
  %copied = call i64 @dtrain_copy(ptr %y, ptr %x, i64 %bytes, i64 %past)
  %k2 = add i64 %k, 1
  br label %look
end:
  ret i64 0
}}"""


def _swaps() -> str:
    """Rows of four words: address of an array, where it begins there, where in mine, bytes; both change places there.

    Both are in registers between the loads and the stores: STEP bytes at a time, then single ones.
    """
    loops = [_swap_loop("w", f"<{STEP} x i8>", STEP, "%whole"), _swap_loop("e", "i8", 1, "%bytes")]
    return f"""
define i64 @dtrain_swaps(ptr %table, i64 %rows, ptr %mine, i64 %a, i64 %b, i64 %c) {{
entry:
  br label %look
look:
  %k = phi i64 [ 0, %entry ], [ %k2, %next ]
  %more = icmp ult i64 %k, %rows
  br i1 %more, label %row, label %end
row:
  %r = getelementptr [4 x i64], ptr %table, i64 %k
{_ROW}
  %x = getelementptr i8, ptr %there, i64 %from
  %y = getelementptr i8, ptr %mine, i64 %to
  %whole = and i64 %bytes, {-STEP}
  br label %w
{"".join(loops).replace("NEXT_w", "e").replace("NEXT_e", "next")}
next:
  %k2 = add i64 %k, 1
  br label %look
end:
  ret i64 0
}}"""


def _swap_loop(n: str, vector: str, step: int, limit: str) -> str:
    """Bytes from where the loop before has stopped up to `limit`."""
    before = {"w": "[ 0, %row ]", "e": "[ %w.i, %w ]"}[n]
    return f"""
{n}:
  %{n}.i = phi i64 {before}, [ %{n}.i2, %{n}.body ]
  %{n}.more = icmp ult i64 %{n}.i, {limit}
  br i1 %{n}.more, label %{n}.body, label %NEXT_{n}
{n}.body:
  %{n}.x = getelementptr i8, ptr %x, i64 %{n}.i
  %{n}.y = getelementptr i8, ptr %y, i64 %{n}.i
  %{n}.u = load {vector}, ptr %{n}.x, align 1
  %{n}.v = load {vector}, ptr %{n}.y, align 1
  store {vector} %{n}.v, ptr %{n}.x, align 1
  store {vector} %{n}.u, ptr %{n}.y, align 1
  %{n}.i2 = add i64 %{n}.i, {step}
  br label %{n}"""


# Seven words of a job: the address of a function, 0 for nothing, and its arguments. Returns what it returns: 0, if all
# went well.
_DO = """
define i64 @dtrain_do(ptr %job, i64 %at) {
entry:
  %fp = getelementptr i64, ptr %job, i64 %at
  %f = load ptr, ptr %fp
  %none = icmp eq ptr %f, null
  br i1 %none, label %end, label %some
some:
  %ap = getelementptr i64, ptr %fp, i64 1
  %a = load i64, ptr %ap
  %bp = getelementptr i64, ptr %fp, i64 2
  %b = load i64, ptr %bp
  %cp = getelementptr i64, ptr %fp, i64 3
  %c = load i64, ptr %cp
  %dp = getelementptr i64, ptr %fp, i64 4
  %d = load i64, ptr %dp
  %ep = getelementptr i64, ptr %fp, i64 5
  %e = load i64, ptr %ep
  %gp = getelementptr i64, ptr %fp, i64 6
  %g = load i64, ptr %gp
  %r = call i64 %f(i64 %a, i64 %b, i64 %c, i64 %d, i64 %e, i64 %g)
  ret i64 %r
end:
  ret i64 0
}"""
