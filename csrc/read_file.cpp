#include "read_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <iterator>
#include <list>
#include <memory>
#include <mutex>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>
#include <unordered_map>

#include "error.hpp"

namespace trireme {

namespace {

constexpr int64_t kPage = 4096;
constexpr size_t kMostOpen = 256;

// Closes when the last holder lets go: a file may leave the cache while another thread still reads from it.
struct Descriptor {
    explicit Descriptor(int number) : number(number) {}
    ~Descriptor() { ::close(number); }
    Descriptor(const Descriptor&) = delete;
    const int number;
};

// The open descriptors of the process, least recently used last.
class OpenFiles {
  public:
    std::shared_ptr<Descriptor> get(const ReadFile& file) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = places_.find(&file);
        if (found != places_.end()) {
            recent_.splice(recent_.begin(), recent_, found->second);
            return recent_.front().second;
        }
        while (!recent_.empty() && recent_.size() >= limit()) forget_last();
        recent_.emplace_front(&file, std::make_shared<Descriptor>(file.open_descriptor()));
        places_[&file] = recent_.begin();
        return recent_.front().second;
    }

    void forget(const ReadFile& file) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = places_.find(&file);
        if (found == places_.end()) return;
        recent_.erase(found->second);
        places_.erase(found);
    }

    std::mutex& mutex() { return mutex_; }

  private:
    // A quarter of what the process may open: the rest is for sockets, logs and checkpoints.
    static size_t limit() {
        struct rlimit most {};
        if (::getrlimit(RLIMIT_NOFILE, &most) != 0 || most.rlim_cur == RLIM_INFINITY) return kMostOpen;
        return std::clamp<size_t>(most.rlim_cur / 4, 1, kMostOpen);
    }

    void forget_last() {
        places_.erase(recent_.back().first);
        recent_.pop_back();
    }

    std::mutex mutex_;
    std::list<std::pair<const ReadFile*, std::shared_ptr<Descriptor>>> recent_;
    std::unordered_map<const ReadFile*, decltype(recent_)::iterator> places_;
};

// Never deleted, because files may be closed after static objects are gone. A fork waits for the lock, so that no child inherits it locked.
OpenFiles& open_files() {
    static OpenFiles* files = [] {
        static OpenFiles* made = new OpenFiles;
        ::pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); }, [] { made->mutex().unlock(); });
        return made;
    }();
    return *files;
}

bool is_same_file(const struct stat& a, const struct stat& b) {
    return a.st_dev == b.st_dev && a.st_ino == b.st_ino && a.st_size == b.st_size;
}

}  // namespace

ReadFile::ReadFile(const std::string& path, const std::string& cure) : path_(path), cure_(cure) {
    if (::stat(path.c_str(), &status_) != 0) throw DataError(message(path, ": cannot open the file: ", std::strerror(errno), "; ", cure));
    if (!S_ISREG(status_.st_mode)) throw DataError(message(path, ": is not a regular file; ", cure));
    open_files().get(*this);  // a file that may not be read is told now
}

ReadFile::~ReadFile() { open_files().forget(*this); }

int ReadFile::open_descriptor() const {
    const int number = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (number < 0) throw DataError(message(path_, ": cannot open the file: ", std::strerror(errno), "; ", cure_));
    struct stat now {};
    if (::fstat(number, &now) != 0 || !is_same_file(now, status_)) {
        ::close(number);
        throw DataError(message(path_, ": the file was replaced or resized while it was in use; start again, and leave corpora alone while they are read"));
    }
    ::posix_fadvise(number, 0, 0, POSIX_FADV_RANDOM);  // without it each read would fetch its surroundings too
    return number;
}

void ReadFile::read(int64_t offset, int64_t size, char* out) const {
    const auto descriptor = open_files().get(*this);
    for (int64_t done = 0; done < size;) {
        const ssize_t count = ::pread(descriptor->number, out + done, static_cast<size_t>(size - done), offset + done);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw DataError(message(path_, ": cannot read bytes ", offset + done, " to ", offset + size, ": ", std::strerror(errno), "; check the storage"));
        if (count == 0) {
            throw DataError(message(path_, ": the file ends at byte ", offset + done, ", expected ", status_.st_size,
                                    " bytes: it was cut while it was in use; leave corpora alone while they are read"));
        }
        done += count;
    }
}

void ReadFile::announce(const std::vector<Extent>& extents) const {
    const auto descriptor = open_files().get(*this);
    int64_t begin = 0, end = 0;  // pages not yet asked for
    const auto ask = [&] {
        if (end > begin) ::posix_fadvise(descriptor->number, begin, end - begin, POSIX_FADV_WILLNEED);  // advice: failure does no harm
    };
    for (const auto& extent : extents) {
        const int64_t first = extent.offset / kPage * kPage, last = (extent.offset + extent.size + kPage - 1) / kPage * kPage;
        if (first >= begin && first <= end) {
            end = std::max(end, last);
            continue;
        }
        ask();
        begin = first;
        end = last;
    }
    ask();
}

}  // namespace trireme
