#include "mlx_fused/backend/cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>

namespace mlx_fused::cpu {

namespace {

// How long a thread spins before it sleeps (docs/design/thresholds.md).
constexpr auto spin_time = std::chrono::microseconds(200);

constexpr int max_threads = 1024;  // the CPUs that a cpu_set_t can hold

template <typename Condition>
bool spin_until(Condition&& condition) {
  auto end = std::chrono::steady_clock::now() + spin_time;
  do {
    for (int i = 0; i < 64; ++i) {  // reasoned, not measured: reading the clock costs more than a look
      if (condition()) {
        return true;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sched_yield();  // to the thread that prepares the next operations, if it has no CPU to itself
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// A job's tasks are shared out as ranges, one for each thread, which then helps the others: neighbouring
// tasks mostly read neighbouring memory, which is quickest read in one piece.
struct Job {
  struct alignas(64) Range {  // its own cache line
    std::atomic<int64_t> next;
    int64_t end;
  };

  Job(const std::function<void(int64_t)>& task, int64_t count) : task(task), ranges(num_threads()) {
    int64_t n = ranges.size();
    for (int64_t i = 0; i < n; ++i) {
      ranges[i].next.store(count * i / n, std::memory_order_relaxed);
      ranges[i].end = count * (i + 1) / n;
    }
  }

  const std::function<void(int64_t)>& task;
  std::vector<Range> ranges;
  std::atomic<size_t> joined{0};
  std::atomic<int> helpers{0};
  std::atomic_flag failed;
  std::exception_ptr error;  // the first exception of a task; read only after all tasks have ended

  void work() {
    try {
      size_t first = joined.fetch_add(1, std::memory_order_relaxed);
      for (size_t i = 0; i < ranges.size(); ++i) {
        Range& range = ranges[(first + i) % ranges.size()];
        for (int64_t t; (t = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) {
          task(t);
        }
      }
    } catch (...) {
      for (Range& range : ranges) {
        range.next.store(range.end, std::memory_order_relaxed);
      }
      if (!failed.test_and_set()) {
        error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  explicit Pool(int workers) {
    for (int i = 0; i < workers; ++i) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        break;  // as many as the system allows; the caller takes part in every job anyway
      }
    }
  }

  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      posted_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    auto idle = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
    std::unique_lock lock(mutex_);
    std::erase(jobs_, &job);
    if (!idle()) {
      lock.unlock();
      spin_until(idle);
      lock.lock();  // the last helper leaves under the lock, so the job may go out of scope after this
      left_.wait(lock, idle);
    }
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    while (true) {
      if (jobs_.empty()) {
        uint64_t seen = posted_.load(std::memory_order_relaxed);
        lock.unlock();
        bool posted = spin_until([&] { return posted_.load(std::memory_order_acquire) != seen; });
        lock.lock();
        if (!posted) {
          wake_.wait(lock, [&] { return !jobs_.empty(); });
        }
        continue;
      }
      Job* job = *std::ranges::min_element(jobs_, {}, [](Job* j) { return j->helpers.load(); });
      job->helpers.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work();
      lock.lock();
      std::erase(jobs_, job);
      if (job->helpers.fetch_sub(1, std::memory_order_release) == 1) {
        left_.notify_all();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  std::vector<Job*> jobs_;  // the jobs that still have tasks to hand out
  std::atomic<uint64_t> posted_{0};
};

// Never destroyed: its threads may still be waiting on it while the process exits.
std::atomic<Pool*> instance{nullptr};

Pool& pool() {
  Pool* current = instance.load(std::memory_order_acquire);
  if (!current) {
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    current = instance.load(std::memory_order_acquire);
    if (!current) {
      // A forked child does not inherit the pool's threads, so it starts a pool of its own.
      static const int registered = pthread_atfork(nullptr, nullptr, [] { instance.store(nullptr); });
      (void)registered;
      current = new Pool(num_threads() - 1);
      instance.store(current, std::memory_order_release);
    }
  }
  return *current;
}

int count_cpus() {
  const char* text = std::getenv("MLX_FUSED_NUM_THREADS");
  if (std::string_view wanted = text ? text : ""; !wanted.empty()) {
    int n = 0;
    const char* last = wanted.data() + wanted.size();
    auto [end, error] = std::from_chars(wanted.data(), last, n);
    if (error != std::errc() || end != last || n < 1 || n > max_threads) {
      throw std::invalid_argument(
          "MLX_FUSED_NUM_THREADS must be a number from 1 to " + std::to_string(max_threads) + " but got '" +
          std::string(wanted) + "'.");
    }
    return n;
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return std::max(1, CPU_COUNT(&set));
  }
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int num_threads() {
  static const int n = count_cpus();
  return n;
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || num_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) {
      task(i);
    }
    return;
  }
  Job job{task, count};
  pool().run(job);
  if (job.error) {
    std::rethrow_exception(job.error);
  }
}

}  // namespace mlx_fused::cpu
