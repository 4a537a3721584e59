// A tokenised corpus on disk: PREFIX.idx (header, lengths, byte offsets, documents) and PREFIX.bin (raw tokens).
//
// Opening reads the header, the sizes, and the first and last block of the arrays: the same few pages for ten documents and for
// 1e9. Every other block of lengths and offsets, or of documents, is checked when something of it is first used, so that damage
// is an error naming file and field, never other documents. The .idx is mapped; the .bin is mapped or read on demand.
// What a block cannot show, a run of several whole blocks displaced together, is found by verify_lengths, which training calls.
//
// Left out: multimodal files (modality codes after the document array), object stores (engine/data/remote.py), big-endian machines.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "mapped_file.hpp"
#include "read_file.hpp"

namespace trireme {

// Codes of byte 17 of an .idx file.
enum class Dtype : uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, f64 = 6, f32 = 7, u16 = 8 };

// How the .bin is read. mmap: as memory, best when it is or stays in the page cache. pread: by many reads at once, best when it is not.
enum class Storage { mmap, pread };

class Corpus {
  public:
    // prefix: the two paths without .idx and .bin. Throws DataError naming file, field, value found and expected, as all members do.
    explicit Corpus(const std::string& prefix, Storage storage = Storage::mmap);

    const std::string& prefix() const { return prefix_; }
    Dtype dtype() const { return dtype_; }
    int64_t itemsize() const { return itemsize_; }
    int64_t num_sequences() const { return num_sequences_; }
    int64_t num_document_entries() const { return num_document_entries_; }  // documents + 1
    int64_t num_tokens() const { return bin_size() / itemsize_; }

    struct Sequence {
        int64_t offset;  // of its first token, in bytes of the .bin
        int64_t length;  // in tokens
    };
    Sequence sequence(int64_t i) const;

    struct Document {
        int64_t first, end;  // its sequences
    };
    Document document(int64_t i) const;

    // Tokens at a byte offset that sequence() gave: in the mapping, or null when the .bin is read on demand.
    const char* mapped(int64_t offset) const { return mapped_bin_ ? mapped_bin_->data() + offset : nullptr; }
    bool is_mapped() const { return mapped_bin_.has_value(); }
    // Bytes of a .bin that is not mapped.
    void read(int64_t offset, int64_t size, char* out) const { read_bin_->read(offset, size, out); }
    // Tells a .bin that is not mapped what will be read; nothing otherwise. Sorted by offset.
    void announce(const std::vector<Extent>& extents) const {
        if (read_bin_) read_bin_->announce(extents);
    }

    // Everything the .idx says, once; later calls cost nothing.
    void verify_lengths() const;    // lengths, byte offsets, and the size of the .bin
    void verify_documents() const;

    // Unaligned, read with load<T>; call the verify function first.
    const char* lengths() const { return idx_.data() + lengths_at_; }      // int32[num_sequences]
    const char* documents() const { return idx_.data() + documents_at_; }  // int64[num_document_entries]

    // The greatest token id of the whole .bin (reads all of it); -1 when there are no tokens.
    int64_t max_token() const;

    // An id below zero: the dtype code is signed and the tokens are not.
    [[noreturn]] void refuse_negative() const;

  private:
    void read_header();
    void check_idx_size() const;
    int64_t bin_size() const { return static_cast<int64_t>(mapped_bin_ ? mapped_bin_->size() : read_bin_->size()); }
    const std::string& bin_path() const { return mapped_bin_ ? mapped_bin_->path() : read_bin_->path(); }
    int64_t length_at(int64_t i) const { return load<int32_t>(idx_.data() + lengths_at_ + 4 * i); }
    int64_t pointer_at(int64_t i) const { return load<int64_t>(idx_.data() + pointers_at_ + 8 * i); }
    int64_t entry_at(int64_t i) const { return load<int64_t>(idx_.data() + documents_at_ + 8 * i); }
    void check_sequences(int64_t block) const;
    void check_documents(int64_t block) const;

    std::string prefix_;
    MappedFile idx_;
    std::optional<MappedFile> mapped_bin_;
    std::optional<ReadFile> read_bin_;
    Dtype dtype_ = Dtype::u16;
    int64_t itemsize_ = 0;
    int64_t num_sequences_ = 0;
    int64_t num_document_entries_ = 0;
    size_t lengths_at_ = 0, pointers_at_ = 0, documents_at_ = 0;

    // Which blocks were found sound; several threads may find it at once.
    using Flags = std::unique_ptr<std::atomic<bool>[]>;
    mutable Flags sound_sequences_, sound_documents_;
    mutable std::atomic<bool> all_sequences_sound_{false}, all_documents_sound_{false};
};

// Calls body with a null pointer of the corpus's token type: visit_tokens(c, [&](auto* type) { ... });
template <class Body>
void visit_tokens(const Corpus& corpus, Body&& body) {
    switch (corpus.dtype()) {
        case Dtype::u8: return body(static_cast<const uint8_t*>(nullptr));
        case Dtype::i8: return body(static_cast<const int8_t*>(nullptr));
        case Dtype::i16: return body(static_cast<const int16_t*>(nullptr));
        case Dtype::u16: return body(static_cast<const uint16_t*>(nullptr));
        case Dtype::i32: return body(static_cast<const int32_t*>(nullptr));
        case Dtype::i64: return body(static_cast<const int64_t*>(nullptr));
        case Dtype::f32:
        case Dtype::f64: break;  // refused by the constructor
    }
}

// Token ids are never below zero; an unsigned id that is read as a signed one may be.
template <class Token>
bool any_negative(const Token* tokens, int64_t count) {
    if constexpr (std::is_signed_v<Token>) {
        Token all = 0;
        for (int64_t i = 0; i < count; ++i) all |= tokens[i];
        return all < 0;
    }
    return false;
}

}  // namespace trireme
