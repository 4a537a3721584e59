// The Python face of csrc: engine._csrc. What it holds is bound where it belongs: bind_corpus.cpp and bind_indices.cpp.
#include <pybind11/pybind11.h>

#include "error.hpp"

namespace py = pybind11;

namespace trireme {

void bind_corpus(py::module_& module);   // bind_corpus.cpp
void bind_indices(py::module_& module);  // bind_indices.cpp

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Corpora, sample and blend indices, batch gathering. See csrc/.";
    py::register_exception<DataError>(module, "DataError", PyExc_ValueError);
    bind_corpus(module);
    bind_indices(module);
}

}  // namespace trireme
