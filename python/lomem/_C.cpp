// lomem._C: facts about the build and the machine. Loading it loads the library, which registers
// the ops; tensors go through torch.ops.lomem, not through this module.
#include <lomem/kernels.h>
#include <lomem/ops.h>
#include <lomem/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and run-time facts of lomem.";
  m.attr("version") = LOMEM_VERSION;
  m.attr("torch_version") = LOMEM_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", &lomem::cpu::capability, "Instruction set that lomem's CPU kernels run with.");
  m.def(
      "cuda_archs", [] { return std::vector<std::string>{}; },
      "CUDA architectures that kernels were compiled for: none, this version has CPU kernels only.");
}
