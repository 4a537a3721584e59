#include "corpus.hpp"

#include <algorithm>

#include "error.hpp"

namespace trireme {

namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr size_t kHeaderSize = 34;  // magic 9, version 8, dtype 1, sequences 8, document entries 8
const char* const kRebuild = "the file is damaged or half-written: write the corpus again";

std::string missing_file_cure(const std::string& prefix) {
    const std::string ending = prefix.size() > 4 ? prefix.substr(prefix.size() - 4) : "";
    if (ending == ".idx" || ending == ".bin") {
        return message("give the prefix without ", ending, ": ", prefix.substr(0, prefix.size() - 4));
    }
    return "a corpus is two files, PREFIX.idx and PREFIX.bin: check the prefix";
}

template <class Found, class Expected>
[[noreturn]] void refuse(const std::string& path, const std::string& field, const Found& found, const Expected& expected,
                         const std::string& cure = kRebuild) {
    throw DataError(message(path, ": ", field, " is ", found, ", expected ", expected, "; ", cure));
}

std::string printable(const char* bytes, size_t count) {
    std::ostringstream text;
    text << std::hex << std::uppercase;
    for (size_t i = 0; i < count; ++i) {
        const auto byte = static_cast<unsigned char>(bytes[i]);
        text << (i ? " " : "") << "0123456789ABCDEF"[byte >> 4] << "0123456789ABCDEF"[byte & 15];
    }
    return text.str();
}

int64_t item_size(const std::string& path, uint8_t code) {
    switch (static_cast<Dtype>(code)) {
        case Dtype::u8:
        case Dtype::i8: return 1;
        case Dtype::i16:
        case Dtype::u16: return 2;
        case Dtype::i32: return 4;
        case Dtype::i64: return 8;
        case Dtype::f32:
        case Dtype::f64: break;
    }
    refuse(path, "dtype code", int{code}, "an integer type (1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16)",
           "token ids are integers: write the corpus again with an integer type");
}

}  // namespace

Corpus::Corpus(const std::string& prefix)
    : prefix_(prefix),
      idx_(prefix + ".idx", missing_file_cure(prefix)),
      bin_(prefix + ".bin", missing_file_cure(prefix)) {
    read_header();
    check_idx_size();
    lengths_at_ = kHeaderSize;
    pointers_at_ = lengths_at_ + 4 * static_cast<size_t>(num_sequences_);
    documents_at_ = pointers_at_ + 8 * static_cast<size_t>(num_sequences_);
    check_lengths();
    check_documents();
}

void Corpus::read_header() {
    if (idx_.size() < kHeaderSize) refuse(idx_.path(), "file size", idx_.size(), message("at least ", kHeaderSize, " bytes"));
    const char* header = idx_.data();
    if (std::memcmp(header, kMagic, sizeof(kMagic)) != 0) {
        refuse(idx_.path(), "magic", printable(header, sizeof(kMagic)), printable(kMagic, sizeof(kMagic)),
               "this is no Megatron index file: check the prefix");
    }
    const auto version = load<uint64_t>(header + 9);
    if (version != 1) refuse(idx_.path(), "version", version, 1, "only version 1 exists: write the corpus again");
    const auto code = load<uint8_t>(header + 17);
    itemsize_ = item_size(idx_.path(), code);
    dtype_ = static_cast<Dtype>(code);
    const auto num_sequences = load<uint64_t>(header + 18);
    const auto num_entries = load<uint64_t>(header + 26);
    // Compared before any product is formed: a damaged count may not overflow one.
    const uint64_t room = idx_.size() - kHeaderSize;
    if (num_sequences > room / 12) refuse(idx_.path(), "sequence count", num_sequences, message("at most ", room / 12, " (what the file can hold)"));
    if (num_entries > room / 8) refuse(idx_.path(), "document count", num_entries, message("at most ", room / 8, " (what the file can hold)"));
    if (num_sequences == 0) refuse(idx_.path(), "sequence count", 0, "at least 1", "the corpus is empty: write it from input that holds documents");
    if (num_entries < 2) refuse(idx_.path(), "document count", num_entries, "at least 2 (documents + 1)");
    num_sequences_ = static_cast<int64_t>(num_sequences);
    num_document_entries_ = static_cast<int64_t>(num_entries);
}

void Corpus::check_idx_size() const {
    const size_t expected = kHeaderSize + 12 * static_cast<size_t>(num_sequences_) + 8 * static_cast<size_t>(num_document_entries_);
    if (idx_.size() == expected + static_cast<size_t>(num_sequences_)) {
        refuse(idx_.path(), "file size", idx_.size(), expected, "one byte more per sequence marks a multimodal corpus: use a text corpus");
    }
    if (idx_.size() != expected) {
        refuse(idx_.path(), "file size", idx_.size(),
               message(expected, " (", num_sequences_, " sequences, ", num_document_entries_, " document entries)"));
    }
}

void Corpus::check_lengths() const {
    int64_t offset = 0;  // in bytes
    for (int64_t i = 0; i < num_sequences_; ++i) {
        const auto length = load<int32_t>(lengths() + 4 * i);
        if (length < 0) refuse(idx_.path(), message("length of sequence ", i), length, "0 or more");
        const auto pointer = load<int64_t>(idx_.data() + pointers_at_ + 8 * i);
        if (pointer != offset) refuse(idx_.path(), message("byte offset of sequence ", i), pointer, message(offset, " (the sum of the lengths before it)"));
        offset += int64_t{length} * itemsize_;
    }
    if (static_cast<int64_t>(bin_.size()) != offset) {
        refuse(bin_.path(), "file size", bin_.size(), message(offset, " (the lengths in the .idx times ", itemsize_, " bytes)"),
               "the file is truncated or belongs to another .idx: copy or write both again");
    }
}

void Corpus::check_documents() const {
    const auto entry = [this](int64_t i) { return load<int64_t>(documents() + 8 * i); };
    if (entry(0) != 0) refuse(idx_.path(), "first document entry", entry(0), 0);
    for (int64_t i = 1; i < num_document_entries_; ++i) {
        if (entry(i) < entry(i - 1)) refuse(idx_.path(), message("document entry ", i), entry(i), message("at least ", entry(i - 1), " (the entry before it)"));
    }
    const int64_t last = entry(num_document_entries_ - 1);
    if (last != num_sequences_) refuse(idx_.path(), "last document entry", last, message(num_sequences_, " (the sequence count)"));
}

int64_t Corpus::max_token() const {
    int64_t greatest = -1;
    visit_tokens(*this, [&](auto* type) {
        using Token = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        const auto* begin = reinterpret_cast<const Token*>(bin_.data());
        const auto count = num_tokens();
        if (count > 0) greatest = static_cast<int64_t>(*std::max_element(begin, begin + count));
    });
    return greatest;
}

}  // namespace trireme
