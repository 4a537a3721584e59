#include "gather.hpp"

#include <algorithm>
#include <type_traits>

#include "error.hpp"
#include "workers.hpp"

namespace trireme {

namespace {

constexpr int kTasksPerThread = 4;  // reads take unequal time: smaller shares end together

[[noreturn]] void refuse(const Corpus& corpus, const std::string& detail) {
    throw DataError(message(corpus.prefix(), ": the sample index does not fit the corpus (", detail,
                            "); delete the index cache, it was built from other files"));
}

// One sample: the documents from (document, offset) to the shared token at (last_document, last_offset), both included.
// visit(byte offset in the .bin, number of tokens, tokens of the row before it, documents of the row before it).
template <class Index, class Visit>
void walk_row(const Corpus& corpus, const SampleTable<Index>& table, int64_t row, Visit&& visit) {
    if (row < 0 || row >= table.num_samples) refuse(corpus, message("sample ", row, " of ", table.num_samples));
    const Index* start = table.starts + 2 * row;
    const int64_t first = start[0], last = start[2], width = table.seq_len + 1;
    if (first < 0 || last < first || last >= table.num_documents) refuse(corpus, message("documents ", first, " to ", last, " of ", table.num_documents));
    int64_t filled = 0;
    int32_t segment = 0;
    for (int64_t position = first; position <= last; ++position) {
        const int64_t number = table.documents[position];
        if (number < 0 || number >= corpus.num_sequences()) refuse(corpus, message("document ", number, " of ", corpus.num_sequences()));
        const auto sequence = corpus.sequence(number);
        const int64_t begin = position == first ? start[1] : 0;
        const int64_t end = position == last ? start[3] + int64_t{1} : sequence.length;
        const int64_t count = end - begin;
        if (begin < 0 || count < 0 || end > sequence.length || filled + count > width) {
            refuse(corpus, message("tokens ", begin, " to ", end, " of document ", number, ", length ", sequence.length));
        }
        if (count == 0) continue;  // an empty document is no segment
        visit(sequence.offset + begin * corpus.itemsize(), count, filled, segment);
        filled += count;
        ++segment;
    }
    if (filled != width) refuse(corpus, message("sample ", row, " holds ", filled, " tokens, expected ", width));
}

template <class Token>
void widen(const Corpus& corpus, const char* source, int64_t count, int64_t* out) {
    const auto* tokens = reinterpret_cast<const Token*>(source);
    std::copy(tokens, tokens + count, out);
    if (any_negative(tokens, count)) corpus.refuse_negative();
}

// What one visit of walk_row asks for, when it is not copied at once.
struct Piece {
    int64_t offset, count;
    int64_t* out;
};

template <class Index>
struct Gatherer {
    const Corpus& corpus;
    const SampleTable<Index>& table;
    const int64_t* rows;
    const Block& out;

    int64_t* tokens(int64_t i) const { return out.tokens + place(i) * (table.seq_len + 1); }
    int64_t place(int64_t i) const { return out.places == nullptr ? i : out.places[i]; }

    void mark(int64_t i, int64_t count, int64_t filled, int32_t segment) const {
        if (out.segments == nullptr) return;
        int32_t* row = out.segments + place(i) * table.seq_len;
        std::fill(row + std::min(filled, table.seq_len), row + std::min(filled + count, table.seq_len), segment);
    }

    // Mapped: rows [begin, end) are copied document after document.
    template <class Token>
    void copy(int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i) {
            int64_t* row = tokens(i);
            walk_row(corpus, table, rows[i], [&](int64_t offset, int64_t count, int64_t filled, int32_t segment) {
                widen<Token>(corpus, corpus.mapped(offset), count, row + filled);
                mark(i, count, filled, segment);
            });
        }
    }

    // Read on demand: all pieces of all rows in the order in which they lie in the file.
    std::vector<Piece> pieces(int64_t num_rows) const {
        std::vector<Piece> found;
        for (int64_t i = 0; i < num_rows; ++i) {
            int64_t* row = tokens(i);
            walk_row(corpus, table, rows[i], [&](int64_t offset, int64_t count, int64_t filled, int32_t segment) {
                found.push_back({offset, count, row + filled});
                mark(i, count, filled, segment);
            });
        }
        std::sort(found.begin(), found.end(), [](const Piece& a, const Piece& b) { return a.offset < b.offset; });
        return found;
    }

    template <class Token>
    void read(const std::vector<Piece>& wanted, int64_t begin, int64_t end) const {
        std::vector<char> bytes;
        for (int64_t i = begin; i < end; ++i) {
            bytes.resize(static_cast<size_t>(wanted[i].count * corpus.itemsize()));
            corpus.read(wanted[i].offset, static_cast<int64_t>(bytes.size()), bytes.data());
            widen<Token>(corpus, bytes.data(), wanted[i].count, wanted[i].out);
        }
    }
};

std::vector<Extent> extents_of(const Corpus& corpus, const std::vector<Piece>& pieces) {
    std::vector<Extent> extents;
    extents.reserve(pieces.size());
    for (const auto& piece : pieces) extents.push_back({piece.offset, piece.count * corpus.itemsize()});
    return extents;
}

}  // namespace

template <class Index>
std::vector<Extent> sample_extents(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows) {
    std::vector<Extent> extents;
    for (int64_t i = 0; i < num_rows; ++i) {
        walk_row(corpus, table, rows[i], [&](int64_t offset, int64_t count, int64_t, int32_t) { extents.push_back({offset, count * corpus.itemsize()}); });
    }
    std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.offset < b.offset; });
    return extents;
}

template <class Index>
void gather(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows, const Block& out, int num_threads) {
    const Gatherer<Index> gatherer{corpus, table, rows, out};
    std::vector<Piece> wanted;
    if (!corpus.is_mapped()) {
        wanted = gatherer.pieces(num_rows);
        corpus.announce(extents_of(corpus, wanted));
    }
    const int64_t count = corpus.is_mapped() ? num_rows : static_cast<int64_t>(wanted.size());
    const int64_t num_tasks = std::min<int64_t>(num_threads > 1 ? int64_t{num_threads} * kTasksPerThread : 1, std::max<int64_t>(count, 1));
    run_tasks(num_threads, num_tasks, [&](int64_t task) {
        const int64_t begin = count * task / num_tasks, end = count * (task + 1) / num_tasks;
        visit_tokens(corpus, [&](auto* type) {
            using Token = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            corpus.is_mapped() ? gatherer.template copy<Token>(begin, end) : gatherer.template read<Token>(wanted, begin, end);
        });
    });
}

template void gather<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t, const Block&, int);
template void gather<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t, const Block&, int);
template std::vector<Extent> sample_extents<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t);
template std::vector<Extent> sample_extents<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t);

}  // namespace trireme
