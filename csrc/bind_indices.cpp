// The Python face of the orders: sample and blend indices, mixtures, packing, shuffling. Everything else is bound in bindings.cpp.
//
// Arrays are taken as they are (no silent conversion): a wrong dtype or a strided array is a TypeError. The GIL is let go of.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "error.hpp"
#include "indices.hpp"
#include "mixture.hpp"
#include "pack.hpp"
#include "shuffle.hpp"

namespace py = pybind11;

namespace trireme {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// num_tokens: of the documents, where the caller knows it; counted here otherwise.
template <class Index>
py::array_t<Index> sample_index(const Array<int32_t>& lengths, const Array<int32_t>& documents, int64_t seq_len, std::optional<int64_t> num_tokens) {
    if (lengths.ndim() != 1 || documents.ndim() != 1) throw py::type_error("lengths and documents must be one-dimensional");
    if (seq_len < 1) throw py::value_error(message("seq_len is ", seq_len, ", expected at least 1"));
    const int32_t* length = lengths.data();
    const int32_t* document = documents.data();
    const int64_t num_lengths = lengths.size(), count = documents.size();
    int64_t expected = num_tokens.value_or(0), found = 0;
    if (!num_tokens) {
        py::gil_scoped_release release;
        expected = count_tokens(length, num_lengths, document, count);
    }
    const int64_t num_samples = count_samples(expected, seq_len);
    py::array_t<Index> rows({num_samples + 1, int64_t{2}});
    Index* out = rows.mutable_data();
    {
        py::gil_scoped_release release;
        found = fill_sample_index(length, num_lengths, document, count, seq_len, num_samples, out);
    }
    if (found != expected) throw py::value_error(message("documents of ", found, " tokens, but num_tokens is ", expected));
    return rows;
}

// values: in place. words and position: the state of numpy's MT19937, words in place, the new position is returned.
int shuffle_like_numpy(py::array values, Array<uint32_t> words, int position) {
    const char kind = values.dtype().kind();
    const bool is_whole = (kind == 'i' || kind == 'u') && (values.itemsize() == 4 || values.itemsize() == 8);
    if (!is_whole || values.ndim() != 1 || !(values.flags() & py::array::c_style)) {
        throw py::type_error("values must be a contiguous one-dimensional array of 4-byte or 8-byte integers");
    }
    if (words.ndim() != 1 || words.size() != MersenneTwister::size || position < 0 || position > MersenneTwister::size) {
        throw py::value_error(message("the state must be ", MersenneTwister::size, " words and a position from 0 to ", MersenneTwister::size));
    }
    const int64_t count = values.size();
    if (count > int64_t{1} << 32) throw py::value_error(message(count, " values, expected at most 2^32"));
    void* items = values.mutable_data();
    MersenneTwister random{words.mutable_data(), position};
    const bool is_wide = values.itemsize() == 8;
    py::gil_scoped_release release;
    if (is_wide) {
        shuffle(static_cast<uint64_t*>(items), count, random);
    } else {
        shuffle(static_cast<uint32_t*>(items), count, random);
    }
    return random.position;
}

void check_num_datasets(size_t count) {
    constexpr size_t limit = std::numeric_limits<int16_t>::max();
    if (count < 1 || count > limit) throw DataError(message("a blend of ", count, " datasets; expected 1 to ", limit, ": merge some of them first"));
}

py::tuple blending_indices(const std::vector<double>& weights, int64_t size) {
    check_num_datasets(weights.size());
    if (size < 0) throw py::value_error(message("size is ", size, ", expected 0 or more"));
    for (double weight : weights) {
        if (!std::isfinite(weight) || weight < 0) throw py::value_error(message("a weight is ", weight, ", expected a finite number, 0 or more"));
    }
    py::array_t<int16_t> dataset(size);
    py::array_t<int64_t> sample(size);
    int16_t* dataset_out = dataset.mutable_data();
    int64_t* sample_out = sample.mutable_data();
    {
        py::gil_scoped_release release;
        fill_blend(weights, size, dataset_out, sample_out);
    }
    return py::make_tuple(dataset, sample);
}

py::tuple exhaustive_blending_indices(const std::vector<int64_t>& sizes) {
    check_num_datasets(sizes.size());
    for (int64_t size : sizes) {
        // A dataset of no samples would never be spent.
        if (size < 1) throw py::value_error(message("a dataset has ", size, " samples, expected at least 1"));
    }
    const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    py::array_t<int16_t> dataset(total);
    py::array_t<int64_t> sample(total);
    int16_t* dataset_out = dataset.mutable_data();
    int64_t* sample_out = sample.mutable_data();
    {
        py::gil_scoped_release release;
        fill_exhaustive_blend(sizes, dataset_out, sample_out);
    }
    return py::make_tuple(dataset, sample);
}

// The first samples of the stretches, and for each stretch the weights of every source at its begin and its end.
py::tuple mixture_indices(const Array<int64_t>& firsts, const Array<double>& weights, int64_t size, const std::optional<Array<int64_t>>& caps) {
    if (firsts.ndim() != 1 || weights.ndim() != 3 || weights.shape(0) != firsts.size() || weights.shape(1) != 2) {
        throw py::type_error("firsts must be [num_stretches] and weights [num_stretches, 2, num_sources]");
    }
    const int64_t num_stretches = firsts.size(), num_sources = weights.shape(2);
    check_num_datasets(static_cast<size_t>(num_sources));
    if (size < 0) throw py::value_error(message("size is ", size, ", expected 0 or more"));
    std::vector<Stretch> stretches;
    for (int64_t s = 0; s < num_stretches; ++s) {
        const bool is_last = s + 1 == num_stretches;
        const int64_t first = firsts.at(s), end = is_last ? std::max(first + 1, size) : firsts.at(s + 1);
        if (end <= first || (s == 0 && first != 0)) throw py::value_error("firsts must start at 0 and rise");
        stretches.push_back({first, end, weights.data(s, 0, 0), weights.data(s, 1, 0)});
        if (is_last && !std::equal(stretches.back().from, stretches.back().from + num_sources, stretches.back().to)) {
            throw py::value_error("the last stretch has no end, so its weights cannot change");
        }
    }
    if (stretches.empty()) throw py::value_error("a mixture needs at least one stretch");
    if (caps && (caps->ndim() != 1 || caps->size() != num_sources)) throw py::type_error("caps must be [num_sources]");
    std::vector<int64_t> limits(static_cast<size_t>(num_sources), std::numeric_limits<int64_t>::max());
    if (caps) limits.assign(caps->data(), caps->data() + num_sources);
    for (int64_t j = 0; j < 2 * num_stretches; ++j) {
        const double* row = weights.data() + j * num_sources;
        const bool is_legal = std::all_of(row, row + num_sources, [](double w) { return w >= 0 && w <= 1; });
        if (!is_legal || std::all_of(row, row + num_sources, [](double w) { return w == 0; })) {
            throw py::value_error("weights must lie in [0, 1], at least one of them above 0");
        }
    }
    py::array_t<int16_t> source(size);
    py::array_t<int64_t> sample(size);
    int16_t* source_out = source.mutable_data();
    int64_t* sample_out = sample.mutable_data();
    Drawn drawn;
    {
        py::gil_scoped_release release;
        drawn = fill_mixture(stretches, limits, size, source_out, sample_out);
    }
    source.resize({drawn.size});
    sample.resize({drawn.size});
    py::array_t<int64_t> departures({static_cast<py::ssize_t>(drawn.departures.size()), py::ssize_t{2}});
    for (size_t d = 0; d < drawn.departures.size(); ++d) {
        const auto row = static_cast<py::ssize_t>(d);
        departures.mutable_at(row, 0) = drawn.departures[d].source;
        departures.mutable_at(row, 1) = drawn.departures[d].at;
    }
    return py::make_tuple(source, sample, departures);
}

py::tuple pack(const Array<int32_t>& lengths, int64_t capacity) {
    if (lengths.ndim() != 1) throw py::type_error("lengths must be one-dimensional");
    const int32_t* length = lengths.data();
    const int64_t count = lengths.size();
    Rows rows;
    {
        py::gil_scoped_release release;
        rows = pack_best_fit(length, count, capacity);
    }
    return py::make_tuple(py::array_t<int64_t>(rows.documents.size(), rows.documents.data()),
                          py::array_t<int64_t>(rows.starts.size(), rows.starts.data()));
}

}  // namespace

void bind_indices(py::module_& module) {
    module.def("sample_index_int32", &sample_index<int32_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(), py::arg("seq_len"),
               py::arg("num_tokens") = py::none());
    module.def("sample_index_int64", &sample_index<int64_t>, py::arg("lengths").noconvert(), py::arg("documents").noconvert(), py::arg("seq_len"),
               py::arg("num_tokens") = py::none());
    module.def("shuffle", &shuffle_like_numpy, py::arg("values").noconvert(), py::arg("words").noconvert(), py::arg("position"),
               "RandomState.shuffle of values, in place; words (in place) and position are the state of its MT19937. Returns the new position.");
    module.def("blending_indices", &blending_indices, py::arg("weights"), py::arg("size"));
    module.def("exhaustive_blending_indices", &exhaustive_blending_indices, py::arg("sizes"));
    module.def("mixture_indices", &mixture_indices, py::arg("firsts").noconvert(), py::arg("weights").noconvert(), py::arg("size"),
               py::arg("caps") = py::none(), "(source int16 [n], sample int64 [n], departures int64 [m, 2]): n is below size where caps leave no source.");
    module.def("pack_best_fit", &pack, py::arg("lengths").noconvert(), py::arg("capacity"),
               "(documents int64 [n] row after row, starts int64 [rows + 1]) of best-fit decreasing packing.");
}

}  // namespace trireme
