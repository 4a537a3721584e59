// The one error that a user's files or settings can cause. Python sees it as engine._csrc.DataError,
// a subclass of ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace trireme {

struct DataError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Joins values of any printable type: message("row ", 3, " of ", path).
template <class... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

}  // namespace trireme
