#include "mapped_file.hpp"

#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.hpp"

namespace trireme {

namespace {

[[noreturn]] void fail(int descriptor, const std::string& path, const char* action, const std::string& cure) {
    const int error = errno;  // close() may overwrite it
    if (descriptor >= 0) ::close(descriptor);
    throw DataError(message(path, ": cannot ", action, ": ", std::strerror(error), "; ", cure));
}

}  // namespace

MappedFile::MappedFile(const std::string& path, const std::string& cure) : path_(path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(descriptor, path, "open the file", cure);
    struct stat status {};
    if (::fstat(descriptor, &status) != 0) fail(descriptor, path, "read the file's size", cure);
    if (!S_ISREG(status.st_mode)) {
        ::close(descriptor);
        throw DataError(message(path, ": is not a regular file; ", cure));
    }
    size_ = static_cast<size_t>(status.st_size);
    if (size_ > 0) {  // mmap refuses a length of zero
        void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
        if (address == MAP_FAILED) {
            const bool is_full = errno == ENOMEM;
            fail(descriptor, path, "map the file", is_full ? "the process holds as many maps as it may: raise vm.max_map_count, or merge corpora" : cure);
        }
        data_ = static_cast<const char*>(address);
    }
    ::close(descriptor);  // the mapping outlives the descriptor
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<char*>(data_), size_);
}

}  // namespace trireme
