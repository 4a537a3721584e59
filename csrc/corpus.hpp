// A tokenised corpus on disk: PREFIX.idx (header, lengths, byte offsets, documents) and PREFIX.bin (raw tokens).
//
// Both files are mapped, never read whole. The constructor checks everything that can be checked without
// touching the tokens, so that later reads need no checks beyond "is this sequence number in range".
// Left out: multimodal files (modality codes after the document array), remote storage, big-endian machines.
#pragma once

#include <cstdint>
#include <string>

#include "mapped_file.hpp"

namespace trireme {

// Codes of byte 17 of an .idx file.
enum class Dtype : uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, f64 = 6, f32 = 7, u16 = 8 };

class Corpus {
  public:
    // prefix: the two paths without .idx and .bin. Throws DataError naming file, field, value found and expected.
    explicit Corpus(const std::string& prefix);

    const std::string& prefix() const { return prefix_; }
    Dtype dtype() const { return dtype_; }
    int64_t itemsize() const { return itemsize_; }
    int64_t num_sequences() const { return num_sequences_; }
    int64_t num_document_entries() const { return num_document_entries_; }  // documents + 1
    int64_t num_tokens() const { return static_cast<int64_t>(bin_.size()) / itemsize_; }

    // Unaligned: read with load<T>.
    const char* lengths() const { return idx_.data() + lengths_at_; }      // int32[num_sequences]
    const char* documents() const { return idx_.data() + documents_at_; }  // int64[num_document_entries]

    int64_t length(int64_t sequence) const { return load<int32_t>(lengths() + 4 * sequence); }
    // First token of a sequence in the mapped .bin; aligned to the item size.
    const char* tokens(int64_t sequence) const { return bin_.data() + load<int64_t>(idx_.data() + pointers_at_ + 8 * sequence); }

    // The greatest token id of the whole .bin (reads all of it); -1 when there are no tokens.
    int64_t max_token() const;

  private:
    void read_header();
    void check_idx_size() const;
    void check_lengths() const;
    void check_documents() const;

    std::string prefix_;
    MappedFile idx_;
    MappedFile bin_;
    Dtype dtype_ = Dtype::u16;
    int64_t itemsize_ = 0;
    int64_t num_sequences_ = 0;
    int64_t num_document_entries_ = 0;
    size_t lengths_at_ = 0, pointers_at_ = 0, documents_at_ = 0;
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

}  // namespace trireme
