// Checks every access that a kernel makes. The compiler's own instrumentation (-fsanitize=thread and
// undefined) calls the __tsan_* and __ubsan_* functions below, whose usual runtimes this file replaces.
//
// Time is one counter. It steps at every launch, threadgroup and barrier, so that comparing when an address
// was last touched with when the running thread last passed a barrier says whether the two are ordered.
#pragma once
#include "state.h"

namespace {

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

// Whether an access at `time` by `thread` happened before what the running thread does now.
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
  } else if (
      u64 in_device = a - reinterpret_cast<u64>(device_arena);
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

}  // namespace

extern "C" {
void __tsan_init() {}
#define TSAN(bytes)                   \
  void __tsan_read##bytes(void* p) {  \
    touch<read>(p, bytes, HERE);      \
  }                                   \
  void __tsan_write##bytes(void* p) { \
    touch<write>(p, bytes, HERE);     \
  }
#define TSAN_UNALIGNED(bytes)                   \
  void __tsan_unaligned_read##bytes(void* p) {  \
    touch<read>(p, bytes, HERE);                \
  }                                             \
  void __tsan_unaligned_write##bytes(void* p) { \
    touch<write>(p, bytes, HERE);               \
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
#define UBSAN(name, text)                           \
  void __ubsan_handle_##name(UbsanLocation* at) {   \
    undefined(at, undefined_behaviour, text, HERE); \
  }
UBSAN(shift_out_of_bounds, "shift out of range")
UBSAN(add_overflow, "signed overflow in +")
UBSAN(sub_overflow, "signed overflow in -")
UBSAN(mul_overflow, "signed overflow in *")
UBSAN(negate_overflow, "signed overflow in negation")
UBSAN(implicit_conversion, "an implicit conversion loses an integer's upper bits")
void __ubsan_handle_divrem_overflow(UbsanLocation* at) {
  undefined(at, undefined_behaviour, "division by zero or overflow", HERE);
  abandon();  // the processor would end the process
}
void __ubsan_handle_out_of_bounds(UbsanLocation* at) {
  undefined(at, out_of_bounds, "array index", HERE);
  abandon();
}
void __ubsan_handle_local_out_of_bounds() {
  if (Finding* f = report(out_of_bounds, HERE)) {
    f->text = "array index";
  }
  abandon();
}
}
