// Defines the operator library and the Python module whose import registers it.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "build_config.h"  // written by setup.py
#include "cpu/isa/isa.h"
#include "schemas.h"
#if FASTSEQ_WITH_CUDA
#include "cuda/lstm_cell/cell.h"
#endif

STABLE_TORCH_LIBRARY(fastseq, m) { fastseq::define_operators(m); }

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "Clang " __clang_version__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

PyObject* cuda_problem(PyObject*, PyObject*) {
#if FASTSEQ_WITH_CUDA
  return PyUnicode_FromString(fastseq::cuda::device_problem().c_str());
#else
  return PyUnicode_FromString("built without nvcc");
#endif
}

PyMethodDef functions[] = {
    {"cuda_problem", cuda_problem, METH_NOARGS, "Return why the current GPU can run no kernel; empty if it can."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C", "Compiled operators.", -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  if (const char* problem = fastseq::cpu::isa_problem()) {
    PyErr_SetString(PyExc_ImportError, problem);
    return nullptr;
  }
  PyObject* module = PyModule_Create(&module_definition);
  if (!module || PyModule_AddStringConstant(module, "compiler", kCompiler) < 0 ||
      PyModule_AddStringConstant(module, "flags", FASTSEQ_BUILD_FLAGS) < 0 ||
      PyModule_AddStringConstant(module, "torch", FASTSEQ_BUILD_TORCH) < 0 ||
      PyModule_AddStringConstant(module, "cuda_architectures", FASTSEQ_CUDA_ARCHITECTURES) < 0 ||
      PyModule_AddStringConstant(module, "cpu", fastseq::cpu::isa_name(fastseq::cpu::machine_isa())) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
