// What the runtime knows: the launch, its threads, its memory and what was found.
#pragma once
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

#define HERE __builtin_return_address(0)

namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 max_threads = 1024, lanes = 32, max_simds = max_threads / lanes;
constexpr u64 stack_bytes = 256 << 10;
constexpr u64 threadgroup_limit = 32 << 10;  // of Apple GPUs

// Each buffer sits in the middle of a slot of its own, far enough from the next that a wrong index, off by
// 2^32 elements even, meets no other buffer.
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
  const char *file, *text, *other_file;
  u32 other_line;
};

// A barrier or a simdgroup function in the source; functions have no line of their own.
struct Site {
  const void* pc;
  const char* file;
  u32 line;
  bool operator==(const Site& other) const {
    return line || other.line ? line == other.line && file == other.file : pc == other.pc;
  }
};

enum State : u8 { ready, waiting, finished };
struct Fiber {
  void* sp;
  State state;
  Site site;
  bool at_threadgroup_barrier;
  u32 builtin[MSL_BUILTINS][3];
};

struct Rendezvous {
  u32 total, arrived;
  Site site;
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
bool aborted;
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

Finding* report_at(Kind kind, const Site& site, const Site& other) {
  Finding* f = report(kind, site.pc, other.pc);
  if (f) {
    f->file = site.file;
    f->line = site.line;
    f->other_file = other.file;
    f->other_line = other.line;
  }
  return f;
}

void to_scheduler();

// Leaves the launch without executing what was found, so that a wild access does no harm.
[[noreturn]] void abandon() {
  aborted = true;
  to_scheduler();
  __builtin_unreachable();
}

}  // namespace
