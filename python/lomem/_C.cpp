// lomem._C: facts about the build and the machine. Loading it loads the library, which registers
// the ops; tensors go through torch.ops.lomem, not through this module.
#include <lomem/kernels.h>
#include <lomem/ops.h>
#include <lomem/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<std::string> cuda_archs() {
  std::vector<std::string> result;
  std::istringstream list(LOMEM_CUDA_ARCHS);
  for (std::string arch; list >> arch;) {
    result.push_back(arch);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and run-time facts of lomem.";
  m.attr("version") = LOMEM_VERSION;
  m.attr("torch_version") = LOMEM_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", &lomem::cpu::capability, "Instruction set that lomem's CPU kernels run with.");
  m.def(
      "cuda_archs", &cuda_archs,
      "CUDA architectures that kernels were compiled for, in the notation of TORCH_CUDA_ARCH_LIST; none in a build "
      "without CUDA.");
}
