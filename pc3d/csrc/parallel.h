#pragma once

#include <cstdint>

#include "threads.h"

namespace pc3d {

// Runs task(i) for i in [0, tasks), handed out one by one in ascending order; on the calling thread alone when one thread
// is asked for (a forked worker must not touch the OpenMP pool). Tasks must not throw.
template <class Task>
void parallel_tasks(int64_t tasks, Task &&task) {
  const int threads = static_cast<int>(tasks < num_threads() ? tasks : num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace pc3d
