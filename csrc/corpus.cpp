#include "corpus.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "error.hpp"

namespace trireme {

namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr size_t kHeaderSize = 34;  // magic 9, version 8, dtype 1, sequences 8, document entries 8
constexpr int64_t kBlock = 512;  // entries of an array that are checked together: a page of byte offsets
const char* const kRebuild = "the file is damaged or half-written: write the corpus again";

std::string missing_file_cure(const std::string& prefix) {
    const std::string ending = prefix.size() > 4 ? prefix.substr(prefix.size() - 4) : "";
    if (ending == ".idx" || ending == ".bin") {
        return message("give the prefix without ", ending, ": ", prefix.substr(0, prefix.size() - 4));
    }
    return "a corpus is two files, PREFIX.idx and PREFIX.bin: check the prefix";
}

constexpr int64_t num_blocks(int64_t num_entries) { return (num_entries + kBlock - 1) / kBlock; }

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

Corpus::Corpus(const std::string& prefix, Storage storage) : prefix_(prefix), idx_(prefix + ".idx", missing_file_cure(prefix)) {
    if (storage == Storage::mmap) {
        mapped_bin_.emplace(prefix + ".bin", missing_file_cure(prefix));
    } else {
        read_bin_.emplace(prefix + ".bin", missing_file_cure(prefix));
    }
    read_header();
    check_idx_size();
    lengths_at_ = kHeaderSize;
    pointers_at_ = lengths_at_ + 4 * static_cast<size_t>(num_sequences_);
    documents_at_ = pointers_at_ + 8 * static_cast<size_t>(num_sequences_);
    sound_sequences_.reset(new std::atomic<bool>[num_blocks(num_sequences_)]());
    sound_documents_.reset(new std::atomic<bool>[num_blocks(num_document_entries_)]());
    for (int64_t i : {int64_t{0}, num_sequences_ - 1}) sequence(i);
    for (int64_t i : {int64_t{0}, num_document_entries_ - 2}) document(i);
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

Corpus::Sequence Corpus::sequence(int64_t i) const {
    if (!all_sequences_sound_.load(std::memory_order_relaxed)) {
        auto& is_sound = sound_sequences_[i / kBlock];
        if (!is_sound.load(std::memory_order_relaxed)) {
            check_sequences(i / kBlock);
            is_sound.store(true, std::memory_order_relaxed);
        }
    }
    return {pointer_at(i), length_at(i)};
}

Corpus::Document Corpus::document(int64_t i) const {
    if (!all_documents_sound_.load(std::memory_order_relaxed)) {
        auto& is_sound = sound_documents_[i / kBlock];
        if (!is_sound.load(std::memory_order_relaxed)) {
            check_documents(i / kBlock);
            is_sound.store(true, std::memory_order_relaxed);
        }
    }
    return {entry_at(i), entry_at(i + 1)};
}

// Each sequence of the block ends where the next one begins, the one before the block ends where the block begins, and the
// first and the last of the corpus lie at the ends of the .bin.
void Corpus::check_sequences(int64_t block) const {
    const int64_t first = block * kBlock, end = std::min(first + kBlock, num_sequences_), size = bin_size();
    const auto name = [](int64_t i) { return message("byte offset of sequence ", i); };
    if (first == 0 && pointer_at(0) != 0) refuse(idx_.path(), name(0), pointer_at(0), "0");
    for (int64_t i = std::max<int64_t>(first - 1, 0); i < end; ++i) {
        const int64_t length = length_at(i), pointer = pointer_at(i);
        if (length < 0) refuse(idx_.path(), message("length of sequence ", i), length, "0 or more");
        // Compared before the sum is formed: a damaged offset may not overflow it.
        if (pointer < 0 || pointer > INT64_MAX / 2 || pointer % itemsize_ != 0) {
            refuse(idx_.path(), name(i), pointer, message("a multiple of ", itemsize_, ", at most ", size, " (the size of the .bin)"));
        }
        const int64_t stop = pointer + length * itemsize_;
        if (i + 1 < num_sequences_ && pointer_at(i + 1) != stop) {
            refuse(idx_.path(), name(i + 1), pointer_at(i + 1), message(stop, " (where sequence ", i, " ends)"));
        }
    }
    const bool is_last = end == num_sequences_;
    const int64_t stop = pointer_at(end - 1) + length_at(end - 1) * itemsize_;
    if (is_last ? stop != size : stop > size) {
        refuse(bin_path(), "file size", size, message(is_last ? "" : "at least ", stop, " (the lengths in the .idx times ", itemsize_, " bytes)"),
               "the file is truncated or belongs to another .idx: copy or write both again");
    }
}

void Corpus::check_documents(int64_t block) const {
    const int64_t last_entry = num_document_entries_ - 1;
    const int64_t first = block * kBlock, end = std::min(first + kBlock, last_entry);
    if (first == 0 && entry_at(0) != 0) refuse(idx_.path(), "first document entry", entry_at(0), 0);
    for (int64_t i = std::max<int64_t>(first, 1); i <= end; ++i) {
        const int64_t before = entry_at(i - 1), entry = entry_at(i);
        if (entry < before) refuse(idx_.path(), message("document entry ", i), entry, message("at least ", before, " (the entry before it)"));
        if (entry > num_sequences_ && i < last_entry) refuse(idx_.path(), message("document entry ", i), entry, message("at most ", num_sequences_, " (the sequence count)"));
    }
    if (entry_at(first) < 0) refuse(idx_.path(), message("document entry ", first), entry_at(first), "0 or more");
    if (end == last_entry && entry_at(end) != num_sequences_) {
        refuse(idx_.path(), "last document entry", entry_at(end), message(num_sequences_, " (the sequence count)"));
    }
}

void Corpus::verify_lengths() const {
    if (all_sequences_sound_.load(std::memory_order_acquire)) return;
    for (int64_t block = 0; block < num_blocks(num_sequences_); ++block) check_sequences(block);
    all_sequences_sound_.store(true, std::memory_order_release);
}

void Corpus::verify_documents() const {
    if (all_documents_sound_.load(std::memory_order_acquire)) return;
    for (int64_t block = 0; block < num_blocks(num_document_entries_ - 1); ++block) check_documents(block);
    all_documents_sound_.store(true, std::memory_order_release);
}

void Corpus::refuse_negative() const {
    refuse(idx_.path(), "dtype code", static_cast<int>(dtype_), "the code of the type that the tokens were written with: some of them are negative numbers so",
           "write the corpus again, with ids of 0 or more");
}

int64_t Corpus::max_token() const {
    int64_t greatest = -1;
    visit_tokens(*this, [&](auto* type) {
        using Token = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        const auto look = [&](const Token* begin, int64_t count) {
            if (count > 0) greatest = std::max(greatest, static_cast<int64_t>(*std::max_element(begin, begin + count)));
        };
        if (is_mapped()) return look(reinterpret_cast<const Token*>(mapped(0)), num_tokens());
        std::vector<Token> piece(std::min<int64_t>(num_tokens(), 1 << 22));
        for (int64_t done = 0; done < num_tokens(); done += piece.size()) {
            const auto count = std::min<int64_t>(piece.size(), num_tokens() - done);
            read(done * itemsize_, count * itemsize_, reinterpret_cast<char*>(piece.data()));
            look(piece.data(), count);
        }
    });
    return greatest;
}

}  // namespace trireme
