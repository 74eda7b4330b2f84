#include "threads.h"

#include <nanobind/nanobind.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <atomic>

#include "module.h"

namespace pc3d {

namespace {
std::atomic<int> requested{1};
std::atomic<bool> forked{false};
}  // namespace

int num_threads() {
#if defined(_OPENMP)
  return forked.load(std::memory_order_relaxed) ? 1 : requested.load(std::memory_order_relaxed);
#else
  return 1;
#endif
}

void register_threads(nanobind::module_ &m) {
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
#endif
  m.def(
      "set_num_threads", [](int threads) { requested.store(threads < 1 ? 1 : threads); }, nanobind::arg("threads"),
      "Threads that kernels use from now on; a forked process always uses one.");
  m.def("get_num_threads", &num_threads, "Threads that kernels use now.");
}

}  // namespace pc3d
