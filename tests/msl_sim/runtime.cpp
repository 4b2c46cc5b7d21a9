// Runs the threads of a launch as fibers and checks every memory access they make. The compiler's own instrumentation
// (-fsanitize=thread) calls the __tsan_* functions below for each load and store, whose runtime this file replaces.
//
// Time is one counter. It steps at every launch, threadgroup and barrier, so that comparing when an address was last
// touched with when the running thread last passed a barrier says whether the two are ordered.
#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

// Saves the running fiber and goes on with another.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
.hidden msl_switch
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 max_threads = 1024, lanes = 32, max_simds = max_threads / lanes;
constexpr u64 stack_bytes = 256 << 10;
constexpr u64 threadgroup_limit = 32 << 10;  // of Apple GPUs

// Each buffer sits in the middle of a slot of its own, far enough from the next that a wrong index, off by 2^32
// elements even, meets no other buffer.
constexpr u32 device_slots = 64, device_slot_bits = 36, group_slots = 32, group_slot_bits = 18;

enum Kind : u32 {
  out_of_bounds,
  race,
  uninitialised,
  misaligned,
  divergent_barrier,
  divergent_collective,
  threadgroup_memory,
  too_many_threads,
  undefined_behaviour,
  write_to_constant,
  undefined_constant,
  no_end,
};

// What is known of two bytes (of one, in arrays of bytes): who last wrote them and read them, when and where.
struct Cell {
  u32 write_time, read_time, write_pc, read_pc;
  u16 write_thread, read_thread, writes;
  u8 readers;  // bits of Readers
  bool atomic;
};
enum Readers : u8 { other_lanes = 1, other_simdgroups = 2, other_threadgroups = 4 };

struct Region {
  u8* base;
  u64 size, cell_count;
  Cell* cells;
  u32 shift;
  bool read_only;
  u64 distinct[2], total[2];  // bytes read, bytes written
  u32 most_writes;
};

struct Finding {
  u32 kind, memory, region, thread, other_thread, line;
  u32 group[3];
  u32 is_write, bytes;
  int64_t offset;
  u64 pc, other_pc;
  const char *file, *text;
};

enum State : u8 { ready, waiting, finished };
struct Fiber {
  void* sp;
  State state;
  const void* site;
  bool at_threadgroup_barrier;
  u32 builtin[MSL_BUILTINS][3];
};

struct Rendezvous {
  u32 total, arrived;
  const void* site;
};
struct Simdgroup {
  Rendezvous meeting;
  u32 time[MSL_MEMORIES];
  u32 parity;
  alignas(16) u8 values[2][lanes][32];
};

u8 *device_arena, *group_arena, *stacks;
Region device_regions[device_slots], group_regions[group_slots];
Fiber fibers[max_threads];
Simdgroup simds[max_simds];
Rendezvous group_meeting;
Finding findings[64];
u32 finding_count;
u32 now = 1, run_time, launch_time, group_start, group_time[MSL_MEMORIES];
u32 current, thread_count, threadgroup_bytes;
u32 builtins[4][3];  // those that all threads of a threadgroup share
const u8 *image_begin, *image_end;
void (*entry)();
void* const* buffers;
void* scheduler_sp;
bool aborted, running;
pthread_t runner;
u64 random_state;

template <class T>
T* reserve(u64 bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<T*>(p);
}

u32 random_below(u32 n) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<u32>(random_state >> 33) % n;
}

// ---- fibers ----
void to_scheduler() {
  msl_switch(&fibers[current].sp, scheduler_sp);
}

void fiber_main() {
  entry();
  fibers[current].state = finished;
  to_scheduler();
  __builtin_unreachable();
}

void* new_stack(u32 i) {
  void** top = reinterpret_cast<void**>(stacks + (i + 1) * stack_bytes);
  *--top = nullptr;  // keeps the stack aligned as a call would leave it
  *--top = reinterpret_cast<void*>(fiber_main);
  return top - 6;
}

// ---- findings ----
Finding* report(Kind kind, const void* pc, const void* other_pc = nullptr) {
  for (u32 i = 0; i < finding_count; i++) {
    if (findings[i].kind == kind && findings[i].pc == reinterpret_cast<u64>(pc)) {
      return nullptr;
    }
  }
  if (finding_count == sizeof(findings) / sizeof(*findings)) {
    return nullptr;
  }
  Finding* f = &findings[finding_count++];
  *f = {};
  f->kind = kind;
  f->thread = f->other_thread = current;
  memcpy(f->group, builtins[MSL_threadgroup_position_in_grid], sizeof(f->group));
  f->pc = reinterpret_cast<u64>(pc);
  f->other_pc = reinterpret_cast<u64>(other_pc);
  return f;
}

// Leaves the launch without executing what was found, so that a wild access neither crashes nor spoils anything.
[[noreturn]] void abandon() {
  aborted = true;
  to_scheduler();
  __builtin_unreachable();
}

// A loop without end would never come back: leaves the fiber from within the signal's handler.
void on_time_out(int) {
  if (!pthread_equal(pthread_self(), runner)) {
    pthread_kill(runner, SIGVTALRM);
  } else if (running) {
    report(no_end, fibers[current].site);
    abandon();
  }
}

void set_timer(u32 seconds) {
  itimerval timer = {{0, seconds ? 100000 : 0}, {static_cast<time_t>(seconds), 0}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

// ---- memory ----
void bind(Region& r, u8* base, u64 size, u32 shift, bool read_only) {
  u64 cells = (size >> shift) + 1;
  if (r.cell_count < cells) {
    if (r.cells) {
      munmap(r.cells, r.cell_count * sizeof(Cell));
    }
    r.cells = reserve<Cell>(cells * sizeof(Cell));
    r.cell_count = cells;
  }
  r.base = base;
  r.size = size;
  r.shift = shift;
  r.read_only = read_only;
  memset(r.distinct, 0, sizeof(r.distinct));
  memset(r.total, 0, sizeof(r.total));
  r.most_writes = 0;
}

const void* address_of(u32 pc) {
  return image_begin + pc;
}

// Whether an access of the current launch's `time` by `thread` happened before what the running thread does now.
bool ordered(u32 time, u32 thread, MslMemory memory) {
  if (time < group_start) {
    return time < launch_time || memory == MSL_THREADGROUP;
  }
  u32 simd = current / lanes;
  return time < group_time[memory] || thread == current ||
         (thread / lanes == simd && time < simds[simd].time[memory]);
}

bool reads_ordered(const Cell& c, MslMemory memory) {
  if (c.read_time < (memory == MSL_DEVICE ? launch_time : group_start)) {
    return true;
  }
  if (c.readers & other_threadgroups) {
    return false;
  }
  if (c.read_time >= group_time[memory] && (c.readers & other_simdgroups)) {
    return false;
  }
  u32 simd = current / lanes;
  if (c.read_time >= group_time[memory] && c.read_time >= simds[simd].time[memory] &&
      (c.readers & other_lanes)) {
    return false;
  }
  return ordered(c.read_time, c.read_thread, memory);
}

void note_read(Cell& c, MslMemory memory, u32 pc) {
  u32 simd = current / lanes;
  if (c.read_time < (memory == MSL_DEVICE ? launch_time : group_start)) {
    c.readers = 0;
  } else if (c.read_time < group_start) {
    c.readers = other_threadgroups;
  } else if (c.read_time < group_time[memory]) {
    c.readers &= other_threadgroups;
  } else if (c.read_thread / lanes != simd) {
    c.readers |= other_simdgroups;
  } else if (c.read_time < simds[simd].time[memory]) {
    c.readers &= other_threadgroups | other_simdgroups;
  } else if (c.read_thread != current) {
    c.readers |= other_lanes;
  }
  c.read_time = now;
  c.read_thread = static_cast<u16>(current);
  c.read_pc = pc;
}

enum Access { read, write, atomic };

template <Access access>
__attribute__((always_inline)) inline void touch(const volatile void* address, u64 bytes, const void* pc) {
  u64 a = reinterpret_cast<u64>(address);
  if (a - reinterpret_cast<u64>(stacks) < max_threads * stack_bytes || !entry) {
    return;  // the thread's own memory, or the initialisation of a kernel's constants
  }
  MslMemory memory = MSL_DEVICE;
  Region* r;
  u32 index;
  if (u64 in_group = a - reinterpret_cast<u64>(group_arena); in_group < u64(group_slots) << group_slot_bits) {
    memory = MSL_THREADGROUP;
    r = &group_regions[index = static_cast<u32>(in_group >> group_slot_bits)];
  } else if (u64 in_device = a - reinterpret_cast<u64>(device_arena);
             in_device < u64(device_slots) << device_slot_bits) {
    r = &device_regions[index = static_cast<u32>(in_device >> device_slot_bits)];
  } else {
    if (address >= image_begin && address < image_end && access == read) {
      return;  // the kernel's own constants
    }
    r = nullptr;
    index = ~0u;
  }
  auto describe = [&](Finding* f) {
    if (f) {
      f->memory = memory;
      f->region = index;
      f->is_write = access != read;
      f->bytes = static_cast<u32>(bytes);
      f->offset = r ? static_cast<int64_t>(a - reinterpret_cast<u64>(r->base)) : static_cast<int64_t>(a);
    }
    return f;
  };
  u64 offset = r ? a - reinterpret_cast<u64>(r->base) : 0;
  if (!r || offset >= r->size || bytes > r->size - offset) {
    describe(report(out_of_bounds, pc));
    abandon();
  }
  if (access != read && r->read_only) {
    describe(report(write_to_constant, pc));
    abandon();
  }
  u32 code = static_cast<u32>(static_cast<const u8*>(pc) - image_begin);
  u64 first = offset >> r->shift, last = (offset + bytes - 1) >> r->shift;
  r->total[access != read] += bytes;
  for (u64 i = first; i <= last; i++) {
    Cell& c = r->cells[i];
    bool written = c.write_time >= (memory == MSL_DEVICE ? launch_time : group_start);
    if (written && !(access == atomic && c.atomic) && !ordered(c.write_time, c.write_thread, memory)) {
      if (Finding* f = describe(report(race, pc, address_of(c.write_pc)))) {
        f->other_thread = c.write_thread;
        f->text = "written";
      }
    }
    if (access == read) {
      if (memory == MSL_THREADGROUP && !written) {
        describe(report(uninitialised, pc));
      }
      r->distinct[0] += c.read_time < run_time ? 1u << r->shift : 0;
      note_read(c, memory, code);
    } else {
      if (!reads_ordered(c, memory)) {
        if (Finding* f = describe(report(race, pc, address_of(c.read_pc)))) {
          f->other_thread = c.read_thread;
          f->text = "read";
        }
      }
      if (c.write_time < run_time) {
        r->distinct[1] += 1u << r->shift;
        c.writes = 0;
      }
      c.writes += c.writes < 0xffff;
      r->most_writes = c.writes > r->most_writes ? c.writes : r->most_writes;
      c.write_time = now;
      c.write_thread = static_cast<u16>(current);
      c.write_pc = code;
      c.atomic = access == atomic;
    }
  }
}

// ---- barriers and collectives ----
void wait_for(Rendezvous& meeting, const void* site, bool threadgroup_barrier) {
  if (meeting.arrived && meeting.site != site) {
    report(threadgroup_barrier ? divergent_barrier : divergent_collective, site, meeting.site);
    abandon();
  }
  meeting.site = site;
  fibers[current].site = site;
  fibers[current].at_threadgroup_barrier = threadgroup_barrier;
}

void meet(Rendezvous& meeting, u32 first, const void* site, u32 flags, u32* times, bool threadgroup_barrier) {
  wait_for(meeting, site, threadgroup_barrier);
  if (++meeting.arrived < meeting.total) {
    fibers[current].state = waiting;
    to_scheduler();
    return;
  }
  meeting.arrived = 0;
  now++;
  for (u32 m = 0; m < MSL_MEMORIES; m++) {
    if (flags >> m & 1) {
      times[m] = now;
    }
  }
  for (u32 i = first; i < first + meeting.total; i++) {
    fibers[i].state = ready;
  }
}

// Two sets of values, so that a lane may bring the next value while others still take this one.
u8 (*exchange(const void* value, u32 bytes, const void* site))[32] {
  Simdgroup& s = simds[current / lanes];
  u32 set = s.parity;
  memcpy(s.values[set][current % lanes], value, bytes);
  if (s.meeting.arrived + 1 == s.meeting.total) {
    s.parity ^= 1;
  }
  meet(s.meeting, current / lanes * lanes, site, 0, s.time, false);
  return s.values[set];
}

void start_group(const u32* grid, const u32* threads) {
  now++;
  group_start = now;
  for (u32 m = 0; m < MSL_MEMORIES; m++) {
    group_time[m] = now;
  }
  u32 simd_count = (thread_count + lanes - 1) / lanes;
  group_meeting = {thread_count, 0, nullptr};
  for (u32 s = 0; s < simd_count; s++) {
    u32 left = thread_count - s * lanes;
    simds[s].meeting = {left < lanes ? left : lanes, 0, nullptr};
    simds[s].parity = 0;
    simds[s].time[0] = simds[s].time[1] = now;
  }
  for (u32 i = 0; i < thread_count; i++) {
    Fiber& f = fibers[i];
    f.state = ready;
    f.site = nullptr;
    f.sp = new_stack(i);
    u32 place[3] = {i % threads[0], i / threads[0] % threads[1], i / threads[0] / threads[1]};
    for (u32 d = 0; d < 3; d++) {
      u32 group = builtins[MSL_threadgroup_position_in_grid][d];
      f.builtin[MSL_threadgroup_position_in_grid][d] = group;
      f.builtin[MSL_threadgroups_per_grid][d] = grid[d];
      f.builtin[MSL_threads_per_threadgroup][d] = threads[d];
      f.builtin[MSL_threads_per_grid][d] = grid[d] * threads[d];
      f.builtin[MSL_thread_position_in_threadgroup][d] = place[d];
      f.builtin[MSL_thread_position_in_grid][d] = group * threads[d] + place[d];
      f.builtin[MSL_thread_index_in_threadgroup][d] = i;
      f.builtin[MSL_simdgroup_index_in_threadgroup][d] = i / lanes;
      f.builtin[MSL_thread_index_in_simdgroup][d] = i % lanes;
      f.builtin[MSL_simdgroups_per_threadgroup][d] = simd_count;
      f.builtin[MSL_threads_per_simdgroup][d] = lanes;
    }
  }
}

// No thread can go on: some wait where others never come.
void report_stall() {
  u32 returned = 0, first = max_threads;
  for (u32 i = thread_count; i-- > 0;) {
    returned += fibers[i].state == finished;
    first = fibers[i].state == waiting ? i : first;
  }
  current = first;
  const void* other = nullptr;
  for (u32 i = 0; i < thread_count && !other; i++) {
    other = fibers[i].state == waiting && fibers[i].site != fibers[first].site ? fibers[i].site : nullptr;
  }
  if (Finding* f = report(
          fibers[first].at_threadgroup_barrier ? divergent_barrier : divergent_collective,
          fibers[first].site,
          other)) {
    f->other_thread = returned;
    f->text = other ? "elsewhere" : "returned";
  }
}

void run_group(bool shuffled) {
  u32 left = thread_count, cursor = 0;
  while (left) {
    u32 start = shuffled ? random_below(thread_count) : cursor, i = start;
    while (fibers[i].state != ready) {
      i = i + 1 == thread_count ? 0 : i + 1;
      if (i == start) {
        report_stall();
        aborted = true;
        return;
      }
    }
    current = cursor = i;
    running = true;
    msl_switch(&scheduler_sp, fibers[i].sp);
    running = false;
    if (aborted) {
      return;
    }
    left -= fibers[i].state == finished;
  }
}

}  // namespace

#define HERE __builtin_return_address(0)

extern "C" {

void msl_threadgroup_barrier(unsigned flags) {
  meet(group_meeting, 0, HERE, flags, group_time, true);
}
void msl_simdgroup_barrier(unsigned flags) {
  Simdgroup& s = simds[current / lanes];
  meet(s.meeting, current / lanes * lanes, HERE, flags, s.time, false);
}
unsigned msl_simd_gather(const void* value, unsigned bytes, void* out) {
  u8(*values)[32] = exchange(value, bytes, HERE);
  for (u32 i = 0; i < lanes; i++) {
    memcpy(static_cast<u8*>(out) + i * bytes, values[i], bytes);
  }
  return simds[current / lanes].meeting.total;
}
void msl_simd_multiply_accumulate(float* d, const float* a, const float* b, const float* c) {
  float both[4] = {a[0], a[1], b[0], b[1]};
  u8(*values)[32] = exchange(both, sizeof(both), HERE);
  // The lane of an 8x8 matrix's element: four lanes a row in each quadrant, two elements a lane.
  auto lane_of = [](u32 row, u32 column) {
    return (row & 4) * 4 + (column & 4) * 2 + (row & 3) * 2 + (column & 3) / 2;
  };
  u32 self = current % lanes, quad = self / 4;
  u32 row = (quad & 4) + self / 2 % 4, column = (quad & 2) * 2 + self % 2 * 2;
  float sums[2] = {c[0], c[1]};
  for (u32 k = 0; k < 8; k++) {
    const float* left = reinterpret_cast<const float*>(values[lane_of(row, k)]);
    const float* right = reinterpret_cast<const float*>(values[lane_of(k, column)]);
    sums[0] += left[k % 2] * right[2];
    sums[1] += left[k % 2] * right[3];
  }
  d[0] = sums[0];
  d[1] = sums[1];
}

void* msl_threadgroup_variable(unsigned id, uint64_t bytes, unsigned element_bytes) {
  u8* base = group_arena + (u64(id) << group_slot_bits) + (1 << (group_slot_bits - 1));
  Region& r = group_regions[id];
  if (!r.size) {
    threadgroup_bytes += static_cast<u32>((bytes + 15) / 16 * 16);
    if (threadgroup_bytes > threadgroup_limit) {
      if (Finding* f = report(threadgroup_memory, HERE)) {
        f->bytes = threadgroup_bytes;
      }
      abandon();
    }
    bind(r, base, bytes, element_bytes > 1, false);
  }
  return base;
}
void msl_atomic(const volatile void* address, unsigned bytes) {
  touch<atomic>(address, bytes, HERE);
}
void msl_max_threads(unsigned threads) {
  if (thread_count > threads) {
    if (Finding* f = report(too_many_threads, HERE)) {
      f->bytes = threads;
    }
    abandon();
  }
}
void msl_undefined_constant(unsigned index) {
  if (Finding* f = report(undefined_constant, HERE)) {
    f->bytes = index;
  }
  abandon();
}
void* msl_buffer(unsigned index) {
  return buffers[index];
}
uint32_t msl_builtin(unsigned which, unsigned dimension) {
  return fibers[current].builtin[which][dimension];
}

// ---- the compiler's instrumentation ----
void __tsan_init() {}
#define TSAN(bytes)                                                                \
  void __tsan_read##bytes(void* p) {                                               \
    touch<read>(p, bytes, HERE);                                                   \
  }                                                                                \
  void __tsan_write##bytes(void* p) {                                              \
    touch<write>(p, bytes, HERE);                                                  \
  }
#define TSAN_UNALIGNED(bytes)                    \
  void __tsan_unaligned_read##bytes(void* p) {   \
    touch<read>(p, bytes, HERE);                 \
  }                                              \
  void __tsan_unaligned_write##bytes(void* p) {  \
    touch<write>(p, bytes, HERE);                \
  }
TSAN(1)
TSAN(2)
TSAN(4)
TSAN(8)
TSAN(16)
TSAN_UNALIGNED(2)
TSAN_UNALIGNED(4)
TSAN_UNALIGNED(8)
TSAN_UNALIGNED(16)
void* __tsan_memcpy(void* to, const void* from, u64 bytes) {
  if (bytes) {
    touch<read>(from, bytes, HERE);
    touch<write>(to, bytes, HERE);
  }
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, u64 bytes) {
  if (bytes) {
    touch<read>(from, bytes, HERE);
    touch<write>(to, bytes, HERE);
  }
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, u64 bytes) {
  if (bytes) {
    touch<write>(to, bytes, HERE);
  }
  return memset(to, value, bytes);
}

struct UbsanLocation {
  const char* file;
  u32 line, column;
};
static void undefined(const UbsanLocation* at, Kind kind, const char* text, const void* pc) {
  if (Finding* f = report(kind, pc)) {
    f->file = at->file;
    f->line = at->line;
    f->text = text;
  }
}
void __ubsan_handle_type_mismatch_v1(UbsanLocation* at, u64 address) {
  undefined(at, address ? misaligned : undefined_behaviour, address ? nullptr : "null pointer", HERE);
  if (!address) {
    abandon();
  }
}
#define UBSAN(name, text)                                 \
  void __ubsan_handle_##name(UbsanLocation* at) {         \
    undefined(at, undefined_behaviour, text, HERE);       \
  }
UBSAN(shift_out_of_bounds, "shift out of range")
UBSAN(add_overflow, "signed overflow in +")
UBSAN(sub_overflow, "signed overflow in -")
UBSAN(mul_overflow, "signed overflow in *")
UBSAN(negate_overflow, "signed overflow in negation")
UBSAN(divrem_overflow, "division by zero or overflow")
void __ubsan_handle_out_of_bounds(UbsanLocation* at) {
  undefined(at, out_of_bounds, "array index", HERE);
  abandon();
}

// ---- what Python calls ----
bool msl_init() {
  if (device_arena) {
    return true;
  }
  device_arena = reserve<u8>(u64(device_slots) << device_slot_bits);
  group_arena = reserve<u8>(u64(group_slots) << group_slot_bits);
  stacks = reserve<u8>(max_threads * stack_bytes);
  return device_arena && group_arena && stacks;
}
void* msl_slot(u32 slot) {
  return device_arena + (u64(slot) << device_slot_bits) + (1ull << (device_slot_bits - 1));
}
void msl_bind(u32 slot, u64 size, u32 shift, bool read_only) {
  bind(device_regions[slot], static_cast<u8*>(msl_slot(slot)), size, shift, read_only);
}
void msl_begin() {
  run_time = ++now;
  finding_count = 0;
  for (Region& r : device_regions) {
    r.size = 0;
  }
}
const Region* msl_region(u32 slot) {
  return &device_regions[slot];
}
u32 msl_findings(const Finding** out) {
  *out = findings;
  return finding_count;
}
// Returns false where the launch had to be abandoned. A seed of zero keeps threads and threadgroups in order.
bool msl_launch(
    void (*kernel)(),
    const void* const* image,
    void* const* bound,
    const u32* grid,
    const u32* threads,
    u32* order,
    u64 seed,
    u32 seconds) {
  entry = kernel;
  buffers = bound;
  image_begin = static_cast<const u8*>(image[0]);
  image_end = static_cast<const u8*>(image[1]);
  thread_count = threads[0] * threads[1] * threads[2];
  launch_time = ++now;
  aborted = false;
  random_state = seed;
  threadgroup_bytes = 0;
  for (Region& r : group_regions) {
    r.size = 0;
  }
  runner = pthread_self();
  struct sigaction act = {}, before;
  act.sa_handler = on_time_out;
  act.sa_flags = SA_NODEFER;  // it never returns
  sigaction(SIGVTALRM, &act, &before);
  set_timer(seconds);
  u32 groups = grid[0] * grid[1] * grid[2];
  for (u32 n = 0; n < groups && !aborted; n++) {
    u32 g = order ? order[n] : n;
    u32* at = builtins[MSL_threadgroup_position_in_grid];
    at[0] = g % grid[0];
    at[1] = g / grid[0] % grid[1];
    at[2] = g / grid[0] / grid[1];
    start_group(grid, threads);
    run_group(seed != 0);
  }
  set_timer(0);
  sigaction(SIGVTALRM, &before, nullptr);
  entry = nullptr;
  return !aborted;
}
}
