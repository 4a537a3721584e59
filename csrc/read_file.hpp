// A file read piece by piece with pread, for storage that answers slowly: many pieces are asked for before the first is waited for.
//
// The descriptor is opened on demand and may be closed again between two reads: only as many stay open as the process may have,
// so ten thousand files can be in use under `ulimit -n 1024`. A file that was replaced or cut since it was first opened is an error.
#pragma once

#include <cstdint>
#include <string>
#include <sys/stat.h>
#include <vector>

namespace trireme {

struct Extent {
    int64_t offset, size;  // in bytes of a file
};

class ReadFile {
  public:
    // Throws DataError when the file is missing; `cure` ends that message.
    ReadFile(const std::string& path, const std::string& cure);
    ~ReadFile();
    ReadFile(const ReadFile&) = delete;
    ReadFile& operator=(const ReadFile&) = delete;

    const std::string& path() const { return path_; }
    size_t size() const { return static_cast<size_t>(status_.st_size); }

    // Throws DataError when the bytes cannot be had: the disk fails, the file has become shorter or another one.
    void read(int64_t offset, int64_t size, char* out) const;

    // Asks the kernel to fetch these pieces, which it does all at once and on its own. They should be sorted by offset.
    void announce(const std::vector<Extent>& extents) const;

    // Opens the file; the caller closes it. Called by the cache of descriptors.
    int open_descriptor() const;

  private:
    std::string path_, cure_;
    struct stat status_ {};
};

}  // namespace trireme
