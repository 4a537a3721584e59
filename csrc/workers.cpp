#include "workers.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <thread>
#include <unistd.h>

namespace trireme {

namespace {

constexpr int kMaxThreads = 256;
constexpr char kThreadName[] = "trireme-data";  // as top and debuggers show it; at most 15 characters

struct Job {
    Job(const std::function<void(int64_t)>& task, int64_t num_tasks) : task(task), num_tasks(num_tasks) {}

    const std::function<void(int64_t)>& task;
    const int64_t num_tasks;
    std::atomic<int64_t> next{0};
    int num_running = 0;  // threads of the pool inside work(); guarded by the pool's mutex
    std::mutex failure;
    int64_t failed_task = std::numeric_limits<int64_t>::max();
    std::exception_ptr error;

    void work() {
        for (int64_t i = next++; i < num_tasks; i = next++) {
            try {
                task(i);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(failure);
                if (i < failed_task) {
                    failed_task = i;
                    error = std::current_exception();
                }
            }
        }
    }
};

class Pool {
  public:
    void run(Job& job, int num_helpers) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; num_threads_ < num_helpers; ++num_threads_) {
                std::thread thread([this] { serve(); });
                ::pthread_setname_np(thread.native_handle(), kThreadName);
                thread.detach();
            }
            tickets_.insert(tickets_.end(), num_helpers, &job);
        }
        arrival_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        // Tickets that nobody took are withdrawn: the job is done, and a busy thread must not be waited for.
        tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), &job), tickets_.end());
        departure_.wait(lock, [&] { return job.num_running == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            arrival_.wait(lock, [this] { return !tickets_.empty(); });
            Job* job = tickets_.front();
            tickets_.pop_front();
            ++job->num_running;
            lock.unlock();
            job->work();
            lock.lock();
            --job->num_running;
            departure_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable arrival_, departure_;
    std::deque<Job*> tickets_;
    int num_threads_ = 0;
};

// Never deleted: its threads sleep until the process ends. A forked child has none of them, and perhaps a locked mutex, so it gets its own.
Pool& pool() {
    static std::mutex mutex;
    static Pool* instance = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (instance == nullptr || owner != ::getpid()) {
        instance = new Pool;
        owner = ::getpid();
    }
    return *instance;
}

}  // namespace

void run_tasks(int num_threads, int64_t num_tasks, const std::function<void(int64_t)>& task) {
    Job job(task, num_tasks);
    const int64_t num_helpers = std::min<int64_t>(std::min(num_threads, kMaxThreads), num_tasks) - 1;
    if (num_helpers < 1) {
        job.work();
    } else {
        pool().run(job, static_cast<int>(num_helpers));
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace trireme
