// The part of engine._csrc that reads corpora: the class Corpus, and gather.
#pragma once

#include <pybind11/pybind11.h>

namespace trireme {

void bind_corpus(pybind11::module_& module);

}  // namespace trireme
