// The Python face of csrc: engine._csrc. Checks shapes and types, allocates outputs, lets go of the GIL, calls the rest.
//
// Arrays are taken as they are (no silent conversion): a wrong dtype or a strided array is a TypeError.
// Corpora and gathering are bound in bind_corpus.cpp, orders and packing in bind_indices.cpp.
#include <pybind11/pybind11.h>

#include "bind_corpus.hpp"
#include "error.hpp"

namespace py = pybind11;

namespace trireme {

void bind_indices(py::module_& module);  // bind_indices.cpp

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Mapped corpora, sample and blend indices, batch gathering. See csrc/.";
    py::register_exception<DataError>(module, "DataError", PyExc_ValueError);

    bind_corpus(module);
    bind_indices(module);
}

}  // namespace trireme
