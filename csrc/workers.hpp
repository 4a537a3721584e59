// Threads that stay: a call hands out numbered tasks to them and to itself, and returns when all are done.
//
//     run_tasks(num_threads, num_tasks, [&](int64_t task) { ... });
//
// Starting a thread costs more than gathering a row, so the threads are kept, grown on demand, shared by all callers of the
// process, and started anew in a forked child. Left out: priorities, nested calls from within a task.
#pragma once

#include <cstdint>
#include <functional>

namespace trireme {

// At most num_threads tasks run at once, the caller's thread included; tasks are claimed in order. When tasks throw, the
// others still run, and the exception of the lowest task is thrown here: the same one for any number of threads.
void run_tasks(int num_threads, int64_t num_tasks, const std::function<void(int64_t)>& task);

}  // namespace trireme
