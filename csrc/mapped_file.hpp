// A whole file mapped read-only into memory, unmapped when the object goes.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>

namespace trireme {

class MappedFile {
  public:
    // Throws DataError when the file is missing or cannot be mapped; `cure` ends that message.
    MappedFile(const std::string& path, const std::string& cure);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const std::string& path() const { return path_; }
    const char* data() const { return data_; }  // null for an empty file
    size_t size() const { return size_; }

  private:
    std::string path_;
    const char* data_ = nullptr;
    size_t size_ = 0;
};

// memcpy, because nothing in an .idx file after byte 9 is aligned.
template <class T>
T load(const char* address) {
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

}  // namespace trireme
