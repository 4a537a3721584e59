// Corpora and gathering as Python sees them. Checks shapes and types, lets go of the GIL, calls the rest.
//
// Arrays are taken as they are (no silent conversion): a wrong dtype or a strided array is a TypeError.
// Returned views keep their Corpus alive and are read-only.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "corpus.hpp"
#include "error.hpp"
#include "gather.hpp"
#include "mapped_file.hpp"

namespace py = pybind11;

namespace trireme {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

py::dtype numpy_dtype(const Corpus& corpus) {
    std::optional<py::dtype> dtype;
    visit_tokens(corpus, [&](auto* type) { dtype = py::dtype::of<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(); });
    return dtype.value();
}

bool has_negative(const Corpus& corpus, const char* data, int64_t count) {
    bool found = false;
    visit_tokens(corpus, [&](auto* type) {
        using Token = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        found = any_negative(reinterpret_cast<const Token*>(data), count);
    });
    return found;
}

// A read-only numpy view of `count` items of mapped memory; owner keeps the mapping alive.
py::array view(py::dtype dtype, int64_t count, const char* data, py::handle owner) {
    py::array array(dtype, {count}, {dtype.itemsize()}, data, owner);
    array.attr("setflags")(py::arg("write") = false);
    return array;
}

py::array map_file(const std::string& path) {
    auto file = std::make_unique<MappedFile>(path, "check the path");
    const MappedFile& mapped = *file;
    const py::capsule owner(file.release(), [](void* pointer) { delete static_cast<MappedFile*>(pointer); });
    return view(py::dtype::of<uint8_t>(), static_cast<int64_t>(mapped.size()), mapped.data(), owner);
}

// Bytes of the .bin that some tokens of a sequence lie in.
Extent extent_of(const Corpus& corpus, int64_t number, int64_t offset, std::optional<int64_t> length) {
    if (number < 0 || number >= corpus.num_sequences()) {
        throw py::index_error(message("sequence ", number, " of ", corpus.num_sequences(), " in ", corpus.prefix()));
    }
    const auto sequence = corpus.sequence(number);
    const int64_t available = sequence.length;
    const int64_t count = length.value_or(available - offset);
    if (offset < 0 || count < 0 || offset > available || count > available - offset) {
        throw py::index_error(message("tokens ", offset, " to ", offset + count, " of sequence ", number, ", length ", available, ", in ", corpus.prefix()));
    }
    return {sequence.offset + offset * corpus.itemsize(), count * corpus.itemsize()};
}

// int64 [n, 2]: begin and end of each piece, in bytes.
py::array_t<int64_t> extent_array(const std::vector<Extent>& extents) {
    py::array_t<int64_t> array({static_cast<py::ssize_t>(extents.size()), py::ssize_t{2}});
    int64_t* out = array.mutable_data();
    for (const auto& extent : extents) {
        *out++ = extent.offset;
        *out++ = extent.offset + extent.size;
    }
    return array;
}

py::array tokens_of(py::object self, int64_t number, int64_t offset, std::optional<int64_t> length) {
    const auto& corpus = self.cast<const Corpus&>();
    const Extent extent = extent_of(corpus, number, offset, length);
    const int64_t count = extent.size / corpus.itemsize();
    py::array tokens;
    if (corpus.is_mapped()) {
        tokens = view(numpy_dtype(corpus), count, corpus.mapped(extent.offset), self);
    } else {
        tokens = py::array(numpy_dtype(corpus), std::vector<py::ssize_t>{count});
        char* out = static_cast<char*>(tokens.mutable_data());
        py::gil_scoped_release release;
        corpus.read(extent.offset, extent.size, out);
    }
    tokens.attr("setflags")(py::arg("write") = false);
    if (has_negative(corpus, static_cast<const char*>(tokens.data()), count)) corpus.refuse_negative();
    return tokens;
}

py::tuple document_of(const Corpus& corpus, int64_t number) {
    const int64_t num_documents = corpus.num_document_entries() - 1;
    if (number < 0 || number >= num_documents) throw py::index_error(message("document ", number, " of ", num_documents, " in ", corpus.prefix()));
    const auto document = corpus.document(number);
    return py::make_tuple(document.first, document.end);
}

// Of the whole array, so all of it is looked at: once, and without the GIL.
py::array lengths_of(py::object self) {
    const auto& corpus = self.cast<const Corpus&>();
    {
        py::gil_scoped_release release;
        corpus.verify_lengths();
    }
    return view(py::dtype::of<int32_t>(), corpus.num_sequences(), corpus.lengths(), self);
}

py::array documents_of(py::object self) {
    const auto& corpus = self.cast<const Corpus&>();
    {
        py::gil_scoped_release release;
        corpus.verify_documents();
    }
    return view(py::dtype::of<int64_t>(), corpus.num_document_entries(), corpus.documents(), self);
}

Storage storage_of(const std::string& name) {
    if (name == "mmap") return Storage::mmap;
    if (name == "pread") return Storage::pread;
    throw py::value_error(message("storage is ", name, ", expected mmap or pread"));
}

// The caller's buffer as it is, or a new one when there is none; a TypeError says what does not fit.
template <class T>
py::array output(const char* name, const py::object& given, int64_t num_rows, int64_t width, bool is_exact) {
    if (given.is_none()) return py::array_t<T>({num_rows, width});
    const std::string wanted = message(py::str(py::dtype::of<T>()).cast<std::string>(), " [", is_exact ? "" : "at least ", num_rows, ", ", width, "]");
    const auto refuse = [&](const std::string& found) { throw py::type_error(message(name, " is ", found, ", expected a writable C-contiguous array ", wanted)); };
    if (!py::isinstance<py::array>(given)) refuse(py::str(py::type::of(given)).cast<std::string>());
    auto array = py::reinterpret_borrow<py::array>(given);
    if (!array.dtype().equal(py::dtype::of<T>())) refuse(py::str(array.dtype()).cast<std::string>());
    const bool is_fitting = array.ndim() == 2 && array.shape(1) == width && (is_exact ? array.shape(0) == num_rows : array.shape(0) >= num_rows);
    if (!is_fitting) refuse("of shape " + py::str(array.attr("shape")).cast<std::string>());
    if (!(array.flags() & py::array::c_style)) refuse("not C-contiguous");
    if (!array.writeable()) refuse("read-only");
    if (reinterpret_cast<uintptr_t>(array.data()) % alignof(T) != 0) refuse("not aligned");
    return array;
}

void check_places(const std::optional<Array<int64_t>>& places, int64_t num_rows, const py::array& tokens) {
    if (!places) return;
    if (places->ndim() != 1 || places->size() != num_rows) throw py::type_error(message("places must be one-dimensional, one for each of ", num_rows, " rows"));
    std::vector<bool> is_taken(tokens.shape(0));
    for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t place = places->data()[i];
        if (place < 0 || place >= tokens.shape(0)) throw py::index_error(message("place ", place, " of ", tokens.shape(0), " rows of tokens_out"));
        if (is_taken[place]) throw py::value_error(message("place ", place, " is given twice"));
        is_taken[place] = true;
    }
}

template <class Index>
SampleTable<Index> table_of(const Array<int32_t>& documents, const Array<Index>& starts, const Array<int64_t>& rows, int64_t seq_len) {
    if (documents.ndim() != 1 || rows.ndim() != 1) throw py::type_error("documents and rows must be one-dimensional");
    if (starts.ndim() != 2 || starts.shape(0) < 1 || starts.shape(1) != 2) throw py::type_error("the sample index must be [num_samples + 1, 2]");
    if (seq_len < 1) throw py::value_error(message("seq_len is ", seq_len, ", expected at least 1"));
    return {documents.data(), documents.size(), starts.data(), starts.shape(0) - 1, seq_len};
}

template <class Index>
py::tuple gather_samples(const Corpus& corpus, const Array<int32_t>& documents, const Array<Index>& starts, const Array<int64_t>& rows, int64_t seq_len,
                         bool with_segments, int num_threads, const py::object& tokens_out, const py::object& segments_out,
                         const std::optional<Array<int64_t>>& places) {
    const auto table = table_of(documents, starts, rows, seq_len);
    if (places && tokens_out.is_none()) throw py::type_error("places needs tokens_out");
    const int64_t num_rows = rows.size();
    py::array tokens = output<int64_t>("tokens_out", tokens_out, num_rows, seq_len + 1, !places);
    check_places(places, num_rows, tokens);
    py::object segments = py::none();
    Block block{static_cast<int64_t*>(tokens.mutable_data()), nullptr, places ? places->data() : nullptr};
    if (with_segments || !segments_out.is_none()) {
        py::array array = output<int32_t>("segments_out", segments_out, tokens.shape(0), seq_len, true);
        block.segments = static_cast<int32_t*>(array.mutable_data());
        segments = array;
    }
    const int64_t* rows_in = rows.data();
    {
        py::gil_scoped_release release;
        gather(corpus, table, rows_in, num_rows, block, num_threads);
    }
    return py::make_tuple(tokens, segments);
}

template <class Index>
py::array_t<int64_t> extents_of(const Corpus& corpus, const Array<int32_t>& documents, const Array<Index>& starts, const Array<int64_t>& rows, int64_t seq_len) {
    return extent_array(sample_extents(corpus, table_of(documents, starts, rows, seq_len), rows.data(), rows.size()));
}

template <class Index>
void announce_samples(const Corpus& corpus, const Array<int32_t>& documents, const Array<Index>& starts, const Array<int64_t>& rows, int64_t seq_len) {
    const auto table = table_of(documents, starts, rows, seq_len);
    if (corpus.is_mapped()) return;
    const int64_t* rows_in = rows.data();
    const int64_t num_rows = rows.size();
    py::gil_scoped_release release;
    corpus.announce(sample_extents(corpus, table, rows_in, num_rows));
}

template <class Index>
void bind_gather(py::module_& module) {
    module.def("gather", &gather_samples<Index>, py::arg("corpus"), py::arg("documents").noconvert(), py::arg("starts").noconvert(),
               py::arg("rows").noconvert(), py::arg("seq_len"), py::arg("segments") = false, py::arg("num_threads") = 1,
               py::arg("tokens_out") = py::none(), py::arg("segments_out") = py::none(), py::arg("places").noconvert() = py::none(),
               "(tokens int64 [n, seq_len + 1], segments int32 [n, seq_len] or None) of the given rows of the sample index.\n\n"
               "tokens_out and segments_out are filled and returned where given. With places (int64 [n], all different) row i of the answer\n"
               "goes to row places[i] of tokens_out, which may then have more rows; the others are left as they are.");
    module.def("extents", &extents_of<Index>, py::arg("corpus"), py::arg("documents").noconvert(), py::arg("starts").noconvert(),
               py::arg("rows").noconvert(), py::arg("seq_len"), "int64 [n, 2]: from which byte to which byte of the .bin the pieces of these rows lie.");
    module.def("announce", &announce_samples<Index>, py::arg("corpus"), py::arg("documents").noconvert(), py::arg("starts").noconvert(),
               py::arg("rows").noconvert(), py::arg("seq_len"), "Tells a corpus read by pread which rows come next; the kernel fetches them meanwhile.");
}

}  // namespace

void bind_corpus(py::module_& module) {
    py::class_<Corpus>(module, "Corpus")
        .def(py::init([](const std::string& prefix, const std::string& storage) {
                 const Storage chosen = storage_of(storage);
                 py::gil_scoped_release release;
                 return std::make_unique<Corpus>(prefix, chosen);
             }),
             py::arg("prefix"), py::arg("storage") = "mmap")
        .def_property_readonly("num_sequences", &Corpus::num_sequences)
        .def_property_readonly("num_documents", [](const Corpus& corpus) { return corpus.num_document_entries() - 1; })
        .def_property_readonly("num_tokens", &Corpus::num_tokens)
        .def_property_readonly("dtype", &numpy_dtype)
        .def_property_readonly("sequence_lengths", &lengths_of)
        .def_property_readonly("document_indices", &documents_of)
        .def("document", &document_of, py::arg("document"), "(first sequence, sequence after the last) of a document.")
        .def("get", &tokens_of, py::arg("sequence"), py::arg("offset") = 0, py::arg("length") = py::none())
        .def("extent", [](const Corpus& corpus, int64_t number, int64_t offset, std::optional<int64_t> length) {
            return extent_array({extent_of(corpus, number, offset, length)});
        }, py::arg("sequence"), py::arg("offset") = 0, py::arg("length") = py::none(), "int64 [1, 2]: from which byte to which byte of the .bin get() reads.")
        .def("max_token", &Corpus::max_token, py::call_guard<py::gil_scoped_release>());
    bind_gather<int32_t>(module);
    bind_gather<int64_t>(module);
    module.def("map_file", &map_file, py::arg("path"), "uint8 [size]: a file as memory, read-only. Unlike Python's mmap it holds no descriptor.");
}

}  // namespace trireme
