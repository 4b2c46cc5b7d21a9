// Runs the threads of a launch as fibers, one threadgroup after the other.
#include "runtime.h"

#include <pthread.h>
#include <signal.h>
#include <sys/time.h>

#include "memory.h"
#include "state.h"

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

void* scheduler_sp;
bool running;  // a fiber, not the scheduler
pthread_t runner;

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

// A loop without end would never come back: leaves the fiber from within the signal's handler.
void on_time_out(int) {
  if (!pthread_equal(pthread_self(), runner)) {
    pthread_kill(runner, SIGVTALRM);
  } else if (running) {
    report_at(no_end, fibers[current].site, {});
    abandon();
  }
}

void set_timer(u32 seconds) {
  itimerval timer = {{0, seconds ? 100000 : 0}, {static_cast<time_t>(seconds), 0}};
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void wait_for(Rendezvous& meeting, const Site& site, bool threadgroup_barrier) {
  if (meeting.arrived && !(meeting.site == site)) {
    report_at(threadgroup_barrier ? divergent_barrier : divergent_collective, site, meeting.site);
    abandon();
  }
  meeting.site = site;
  fibers[current].site = site;
  fibers[current].at_threadgroup_barrier = threadgroup_barrier;
}

void meet(Rendezvous& meeting, u32 first, const Site& site, u32 flags, u32* times, bool threadgroup_barrier) {
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
  meet(s.meeting, current / lanes * lanes, {site}, 0, s.time, false);
  return s.values[set];
}

void start_group(const u32* grid, const u32* threads) {
  now++;
  group_start = now;
  for (u32 m = 0; m < MSL_MEMORIES; m++) {
    group_time[m] = now;
  }
  u32 simd_count = (thread_count + lanes - 1) / lanes;
  group_meeting = {thread_count, 0, {}};
  for (u32 s = 0; s < simd_count; s++) {
    u32 left = thread_count - s * lanes;
    simds[s].meeting = {left < lanes ? left : lanes, 0, {}};
    simds[s].parity = 0;
    simds[s].time[0] = simds[s].time[1] = now;
  }
  for (u32 i = 0; i < thread_count; i++) {
    Fiber& f = fibers[i];
    f.state = ready;
    f.site = {};
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
  const Fiber& f = fibers[first];
  Site other = {};
  for (u32 i = 0; i < thread_count && !other.pc; i++) {
    if (fibers[i].state == waiting && !(fibers[i].site == f.site)) {
      other = fibers[i].site;
    }
  }
  if (Finding* found =
          report_at(f.at_threadgroup_barrier ? divergent_barrier : divergent_collective, f.site, other)) {
    found->other_thread = returned;
    found->text = other.pc ? "elsewhere" : "returned";
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

extern "C" {

void msl_threadgroup_barrier(unsigned flags, const char* file, unsigned line) {
  meet(group_meeting, 0, {HERE, file, line}, flags, group_time, true);
}
void msl_simdgroup_barrier(unsigned flags, const char* file, unsigned line) {
  Simdgroup& s = simds[current / lanes];
  meet(s.meeting, current / lanes * lanes, {HERE, file, line}, flags, s.time, false);
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
void* msl_buffer(unsigned index, unsigned alignment) {
  if (reinterpret_cast<u64>(buffers[index]) % alignment) {
    if (Finding* f = report(misaligned, HERE)) {
      f->text = "a buffer's offset";
    }
  }
  return buffers[index];
}
uint32_t msl_builtin(unsigned which, unsigned dimension) {
  return fibers[current].builtin[which][dimension];
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
u32 msl_threadgroup_bytes() {
  return threadgroup_bytes;
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
