// The Python face of csrc: engine._csrc. Checks shapes and types, allocates outputs, lets go of the GIL, calls the rest.
//
// Arrays are taken as they are (no silent conversion): a wrong dtype or a strided array is a TypeError.
// Returned views keep their Corpus alive and are read-only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "corpus.hpp"
#include "error.hpp"
#include "gather.hpp"

namespace py = pybind11;

namespace trireme {

void bind_indices(py::module_& module);  // bind_indices.cpp

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::dtype numpy_dtype(const Corpus& corpus) {
    std::optional<py::dtype> dtype;
    visit_tokens(corpus, [&](auto* type) { dtype = py::dtype::of<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(); });
    return dtype.value();
}

// A read-only numpy view of `count` items of mapped memory; owner keeps the mapping alive.
py::array view(py::dtype dtype, int64_t count, const char* data, py::handle owner) {
    py::array array(dtype, {count}, {dtype.itemsize()}, data, owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

py::array tokens_of(py::object self, int64_t sequence, int64_t offset, std::optional<int64_t> length) {
    const auto& corpus = self.cast<const Corpus&>();
    if (sequence < 0 || sequence >= corpus.num_sequences()) {
        throw py::index_error(message("sequence ", sequence, " of ", corpus.num_sequences(), " in ", corpus.prefix()));
    }
    const int64_t available = corpus.length(sequence);
    const int64_t count = length.value_or(available - offset);
    if (offset < 0 || count < 0 || offset > available || count > available - offset) {
        throw py::index_error(message("tokens ", offset, " to ", offset + count, " of sequence ", sequence, ", length ", available, ", in ", corpus.prefix()));
    }
    return view(numpy_dtype(corpus), count, corpus.tokens(sequence) + offset * corpus.itemsize(), self);
}

template <class Index>
py::tuple gather_samples(const Corpus& corpus, const Array<int32_t>& documents, const Array<Index>& starts,
                         const Array<int64_t>& rows, int64_t seq_len, bool with_segments, int num_threads) {
    if (documents.ndim() != 1 || rows.ndim() != 1) throw py::type_error("documents and rows must be one-dimensional");
    if (starts.ndim() != 2 || starts.shape(0) < 1 || starts.shape(1) != 2) throw py::type_error("the sample index must be [num_samples + 1, 2]");
    if (seq_len < 1) throw py::value_error(message("seq_len is ", seq_len, ", expected at least 1"));
    const SampleTable<Index> table{documents.data(), documents.size(), starts.data(), starts.shape(0) - 1, seq_len};
    const int64_t num_rows = rows.size();
    py::array_t<int64_t> tokens({num_rows, seq_len + 1});
    py::object segments = py::none();
    int32_t* segments_out = nullptr;
    if (with_segments) {
        py::array_t<int32_t> array({num_rows, seq_len});
        segments_out = array.mutable_data();
        segments = array;
    }
    int64_t* tokens_out = tokens.mutable_data();
    const int64_t* rows_in = rows.data();
    {
        py::gil_scoped_release release;
        gather(corpus, table, rows_in, num_rows, tokens_out, segments_out, num_threads);
    }
    return py::make_tuple(tokens, segments);
}

template <class Index>
void bind_gather(py::module_& module) {
    module.def("gather", &gather_samples<Index>, py::arg("corpus"), py::arg("documents").noconvert(), py::arg("starts").noconvert(),
               py::arg("rows").noconvert(), py::arg("seq_len"), py::arg("segments") = false, py::arg("num_threads") = 1,
               "(tokens int64 [n, seq_len + 1], segments int32 [n, seq_len] or None) of the given rows of the sample index.");
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Mapped corpora, sample and blend indices, batch gathering. See csrc/.";
    py::register_exception<DataError>(module, "DataError", PyExc_ValueError);

    py::class_<Corpus>(module, "Corpus")
        .def(py::init<const std::string&>(), py::arg("prefix"), py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("num_sequences", &Corpus::num_sequences)
        .def_property_readonly("num_tokens", &Corpus::num_tokens)
        .def_property_readonly("dtype", &numpy_dtype)
        .def_property_readonly("sequence_lengths", [](py::object self) {
            const auto& corpus = self.cast<const Corpus&>();
            return view(py::dtype::of<int32_t>(), corpus.num_sequences(), corpus.lengths(), self);
        })
        .def_property_readonly("document_indices", [](py::object self) {
            const auto& corpus = self.cast<const Corpus&>();
            return view(py::dtype::of<int64_t>(), corpus.num_document_entries(), corpus.documents(), self);
        })
        .def("get", &tokens_of, py::arg("sequence"), py::arg("offset") = 0, py::arg("length") = py::none())
        .def("max_token", &Corpus::max_token, py::call_guard<py::gil_scoped_release>());

    bind_indices(module);
    bind_gather<int32_t>(module);
    bind_gather<int64_t>(module);
}

}  // namespace trireme
