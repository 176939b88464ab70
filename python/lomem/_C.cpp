// lomem._C: facts about the build and the machine, and a short way to the step activations. Loading it loads the
// library, which registers the ops. They are torch.ops.lomem; but a call that finds its argument types at run time
// costs as much as a small activation.
#include <lomem/kernels.h>
#include <lomem/ops.h>
#include <lomem/step_function.h>
#include <lomem/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace lomem::detail {

void bind_reused_memory(pybind11::module_& m);  // _reused_memory.cpp

}  // namespace lomem::detail

namespace {

std::vector<std::string> cuda_archs() {
  std::vector<std::string> result;
  std::istringstream list(LOMEM_CUDA_ARCHS);
  for (std::string arch; list >> arch;) {
    result.push_back(arch);
  }
  return result;
}

/// op(input), or NotImplemented where input is no tensor: torch.ops says so best.
template <class Op>
pybind11::object call_activation(const pybind11::handle& input, Op&& op) {
  HANDLE_TH_ERRORS
  if (!THPVariable_Check(input.ptr())) {
    return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
  }
  // A copy: while others run, one may swap the tensor out of the object.
  const at::Tensor tensor = THPVariable_Unpack(input.ptr());
  at::Tensor result;
  {
    const pybind11::gil_scoped_release others_run;
    result = op(tensor);
  }
  return pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(std::move(result)));
  END_HANDLE_TH_ERRORS_PYBIND
}

pybind11::object regelu2(
    const pybind11::handle& input, const pybind11::handle& approximate, const pybind11::handle& fast) {
  if (!PyUnicode_Check(approximate.ptr()) || !PyBool_Check(fast.ptr())) {
    return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
  }
  const auto name = approximate.cast<std::string>();
  const bool is_fast = fast.ptr() == Py_True;
  return call_activation(input, [&](const at::Tensor& x) { return lomem::regelu2(x, name, is_fast); });
}

std::pair<std::vector<double>, std::vector<double>> step_function(
    const std::string& function, int64_t bits, const std::string& criterion, const std::vector<double>& parameters) {
  HANDLE_TH_ERRORS
  lomem::StepFunction steps = lomem::step_function(function, bits, criterion, parameters);
  return {std::move(steps.boundaries), std::move(steps.levels)};
  END_HANDLE_TH_ERRORS_PYBIND
}

pybind11::object resilu2(const pybind11::handle& input, const pybind11::handle& fast) {
  if (!PyBool_Check(fast.ptr())) {
    return pybind11::reinterpret_borrow<pybind11::object>(Py_NotImplemented);
  }
  const bool is_fast = fast.ptr() == Py_True;
  return call_activation(input, [&](const at::Tensor& x) { return lomem::resilu2(x, is_fast); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build and run-time facts of lomem, and calls of its activations.";
  m.attr("version") = LOMEM_VERSION;
  m.attr("torch_version") = LOMEM_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("cpu_capability", &lomem::cpu::capability, "Instruction set that lomem's CPU kernels run with.");
  m.def(
      "cuda_archs", &cuda_archs,
      "CUDA architectures that kernels were compiled for, in the notation of TORCH_CUDA_ARCH_LIST; none in a build "
      "without CUDA.");
  m.def(
      "step_function", &step_function,
      "Boundaries and levels that the library has for a function of lomem::step_activation.");
  m.def(
      "regelu2", &regelu2,
      "torch.ops.lomem.regelu2, past __torch_function__; NotImplemented for arguments of other types.");
  m.def(
      "resilu2", &resilu2,
      "torch.ops.lomem.resilu2, past __torch_function__; NotImplemented for arguments of other types.");
  m.def("manual_seed", &lomem::manual_seed, "Begins lomem's stream of seeds anew.");
  m.def("random_state", &lomem::random_state, "Where the stream of seeds began and how many were drawn since.");
  m.def("set_random_state", &lomem::set_random_state, "Goes on from such a state.");
  m.def(
      "begin_random_stream", &lomem::detail::begin_random_stream,
      "Begins the stream of seeds at the position of torch's default CPU generator.");
  lomem::detail::bind_reused_memory(m);
}
