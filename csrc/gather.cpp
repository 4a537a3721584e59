#include "gather.hpp"

#include <algorithm>

#include "error.hpp"
#include "workers.hpp"

namespace trireme {

namespace {

[[noreturn]] void refuse(const Corpus& corpus, const std::string& detail) {
    throw DataError(message(corpus.prefix(), ": the sample index does not fit the corpus (", detail,
                            "); delete the index cache, it was built from other files"));
}

// One sample: the documents from (document, offset) to the shared token at (last_document, last_offset), both included.
template <class Token, class Index>
void gather_row(const Corpus& corpus, const SampleTable<Index>& table, int64_t row, int64_t* tokens, int32_t* segments) {
    if (row < 0 || row >= table.num_samples) refuse(corpus, message("sample ", row, " of ", table.num_samples));
    const Index* start = table.starts + 2 * row;
    const int64_t first = start[0], last = start[2], width = table.seq_len + 1;
    if (first < 0 || last < first || last >= table.num_documents) refuse(corpus, message("documents ", first, " to ", last, " of ", table.num_documents));
    int64_t filled = 0;
    int32_t segment = 0;
    for (int64_t position = first; position <= last; ++position) {
        const int64_t sequence = table.documents[position];
        if (sequence < 0 || sequence >= corpus.num_sequences()) refuse(corpus, message("document ", sequence, " of ", corpus.num_sequences()));
        const int64_t begin = position == first ? start[1] : 0;
        const int64_t end = position == last ? start[3] + int64_t{1} : corpus.length(sequence);
        const int64_t count = end - begin;
        if (begin < 0 || count < 0 || end > corpus.length(sequence) || filled + count > width) {
            refuse(corpus, message("tokens ", begin, " to ", end, " of document ", sequence, ", length ", corpus.length(sequence)));
        }
        if (count == 0) continue;  // an empty document is no segment
        const auto* source = reinterpret_cast<const Token*>(corpus.tokens(sequence)) + begin;
        std::copy(source, source + count, tokens + filled);
        if (segments != nullptr) std::fill(segments + std::min(filled, table.seq_len), segments + std::min(filled + count, table.seq_len), segment);
        filled += count;
        ++segment;
    }
    if (filled != width) refuse(corpus, message("sample ", row, " holds ", filled, " tokens, expected ", width));
}

}  // namespace

template <class Index>
void gather(const Corpus& corpus, const SampleTable<Index>& table, const int64_t* rows, int64_t num_rows, const Block& out, int num_threads) {
    const int64_t num_tasks = std::clamp<int64_t>(num_threads, 1, std::max<int64_t>(num_rows, 1));
    run_tasks(num_threads, num_tasks, [&](int64_t task) {
        visit_tokens(corpus, [&](auto* type) {
            using Token = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
            for (int64_t i = num_rows * task / num_tasks; i < num_rows * (task + 1) / num_tasks; ++i) {
                const int64_t place = out.places == nullptr ? i : out.places[i];
                gather_row<Token>(corpus, table, rows[i], out.tokens + place * (table.seq_len + 1),
                                  out.segments == nullptr ? nullptr : out.segments + place * table.seq_len);
            }
        });
    });
}

template void gather<int32_t>(const Corpus&, const SampleTable<int32_t>&, const int64_t*, int64_t, const Block&, int);
template void gather<int64_t>(const Corpus&, const SampleTable<int64_t>&, const int64_t*, int64_t, const Block&, int);

}  // namespace trireme
